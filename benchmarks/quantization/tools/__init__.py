"""Programs that other libraries' interpreters run: one float ONNX file in, one quantized file out.

Each is called as ``python TOOL.py JOB.json`` and imports nothing of this project. The job names the files
(``model``, ``calibration`` with one array ``[n, …]`` an input, ``output``) and the ``options`` of the
variant; the last line that is printed is a JSON object of package versions.
"""
