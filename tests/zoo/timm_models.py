"""Small members of the families of timm, untrained: one a module of the library, and more where they differ.

Depths and image sizes are cut as far as each architecture goes, since a second block of a kind says
nothing that the first did not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from tests.zoo import torchvision_schemas
from tests.zoo.network import Network, normal, seeded

_FOUR: dict[str, Any] = {"depths": (1, 1, 2, 1)}


def _sized(size: int, **options: Any) -> dict[str, Any]:
    """Options for an architecture that has to be told its image size."""
    return {"img_size": size, **options}


# family, timm name, image size, options
_CONVOLUTIONAL: tuple[tuple[str, str, int, dict[str, Any]], ...] = (
    ("resnet", "resnet10t", 64, {}),
    ("resnet", "resnet26d", 64, {}),
    ("resnet", "resnetblur18", 64, {}),
    ("resnet", "seresnext26d_32x4d", 64, {}),
    ("resnet", "ecaresnet26t", 64, {}),
    ("resnetv2", "resnetv2_18", 64, {}),
    ("resnetv2", "resnetv2_50x1_bit", 64, {}),
    ("res2net", "res2net50_14w_8s", 64, {}),
    ("resnest", "resnest14d", 64, {}),
    ("sknet", "skresnet18", 64, {}),
    ("senet", "legacy_seresnet18", 64, {}),
    ("regnet", "regnetx_002", 64, {}),
    ("regnet", "regnety_002", 64, {}),
    ("regnet", "regnetz_005", 64, {}),
    ("densenet", "densenet121", 64, {}),
    ("dla", "dla34", 64, {}),
    ("dla", "dla46x_c", 64, {}),
    ("dpn", "dpn48b", 64, {}),
    ("hrnet", "hrnet_w18_small", 64, {}),
    ("vovnet", "ese_vovnet19b_slim", 64, {}),
    ("vgg", "vgg11_bn", 32, {}),
    ("xception", "legacy_xception", 64, {}),
    ("xception_aligned", "xception41", 64, {}),
    ("inception_v3", "inception_v3", 96, {}),
    ("inception_v4", "inception_v4", 128, {}),
    ("inception_resnet_v2", "inception_resnet_v2", 96, {}),
    ("nasnet", "nasnetalarge", 96, {"stem_size": 32, "num_features": 1056}),
    ("pnasnet", "pnasnet5large", 96, {}),
    ("efficientnet", "efficientnet_b0", 64, {}),
    ("efficientnet", "efficientnet_lite0", 64, {}),
    ("efficientnet", "efficientnet_b0_gn", 64, {}),
    ("efficientnet", "efficientnet_cc_b0_4e", 64, {}),
    ("efficientnet", "efficientnetv2_rw_t", 64, {}),
    ("mobilenetv2", "mobilenetv2_035", 64, {}),
    ("mobilenetv3", "mobilenetv3_small_050", 64, {}),
    ("mobilenetv4", "mobilenetv4_conv_small_035", 64, {}),
    ("mobilenetv4", "mobilenetv4_hybrid_medium_075", 64, {}),
    ("ghostnet", "ghostnet_050", 64, {}),
    ("ghostnetv2", "ghostnetv2_100", 64, {}),
    ("ghostnetv3", "ghostnetv3_050", 64, {}),
    ("tinynet", "tinynet_e", 64, {}),
    ("lcnet", "lcnet_035", 64, {}),
    ("lcnetv2", "lcnetv2_small", 64, {}),
    ("mnasnet", "mnasnet_050", 64, {}),
    ("mnasnet", "semnasnet_075", 64, {}),
    ("spnasnet", "spnasnet_100", 64, {}),
    ("fbnet", "fbnetc_100", 64, {}),
    ("mixnet", "mixnet_s", 64, {}),
    ("hardcorenas", "hardcorenas_a", 64, {}),
    ("rexnet", "rexnet_100", 64, {}),
    ("repvgg", "repvgg_a0", 64, {}),
    ("repvit", "repvit_m0_9", 64, {}),
    ("repghost", "repghostnet_050", 64, {}),
    ("mobileone", "mobileone_s0", 64, {}),
    ("convnext", "convnext_atto", 64, {}),
    ("convnextv2", "convnextv2_atto", 64, {}),
    ("convmixer", "convmixer_768_32", 56, {}),
    ("nfnet", "nf_regnet_b0", 64, {}),
    ("nfnet", "test_nfnet", 64, {}),
    ("byobnet", "gernet_s", 64, {}),
    ("byobnet", "gcresnext26ts", 64, {}),
    ("byobnet", "bat_resnext26ts", 256, {}),
    ("byobnet", "regnetz_b16", 64, {}),
    ("byoanet", "botnet26t_256", 64, _sized(64)),
    ("byoanet", "halonet26t", 256, {}),
    ("byoanet", "lambda_resnet26t", 64, _sized(64)),
    ("cspnet", "cs3darknet_s", 64, {}),
    ("cspnet", "cspresnext50", 64, {}),
    ("cspnext", "cspnext_tiny", 64, {}),
    ("darknet", "darknet17", 64, {}),
    ("selecsls", "selecsls42b", 64, {}),
    ("tresnet", "tresnet_m", 64, {}),
    ("hgnet", "hgnet_tiny", 64, {}),
    ("hgnetv2", "hgnetv2_b0", 64, {}),
    ("starnet", "starnet_s050", 64, {}),
    ("rdnet", "rdnet_tiny", 64, {}),
    ("fasternet", "fasternet_t0", 64, {}),
    ("inception_next", "inception_next_atto", 64, {}),
    ("mambaout", "mambaout_femto", 64, {}),
)
_ATTENTION: tuple[tuple[str, str, int, dict[str, Any]], ...] = (
    ("vit", "vit_tiny_patch16_224", 64, _sized(64, depth=2)),
    ("vit", "vit_small_patch16_rope_224", 64, _sized(64, depth=2)),
    ("vit", "vit_small_patch14_reg4_dinov2", 56, _sized(56, depth=2)),
    ("vit_hybrid", "vit_tiny_r_s16_p8_224", 64, _sized(64, depth=2)),
    ("vit_relpos", "vit_relpos_small_patch16_224", 64, _sized(64, depth=2)),
    ("vit_sam", "samvit_base_patch16_224", 64, _sized(64, depth=2, embed_dim=96, num_heads=3)),
    ("vitamin", "vitamin_small_224", 64, _sized(64)),
    ("deit", "deit_tiny_distilled_patch16_224", 64, _sized(64, depth=2)),
    ("deit", "deit3_small_patch16_224", 64, _sized(64, depth=2)),
    ("beit", "beit_base_patch16_224", 64, _sized(64, depth=2, embed_dim=192, num_heads=3)),
    ("cait", "cait_xxs24_224", 64, _sized(64, depth=2)),
    ("coat", "coat_tiny", 64, _sized(64)),
    ("coat", "coat_lite_tiny", 64, _sized(64)),
    ("convit", "convit_tiny", 64, _sized(64, depth=3, local_up_to_layer=2)),
    ("crossvit", "crossvit_9_240", 48, _sized(48, img_scale=(1.0, 2 / 3))),
    ("davit", "davit_tiny", 64, _FOUR),
    ("edgenext", "edgenext_xx_small", 64, {}),
    ("efficientformer", "efficientformer_l1", 224, {}),
    ("efficientformer_v2", "efficientformerv2_s0", 64, _sized(64)),
    ("efficientvit_mit", "efficientvit_b0", 64, {}),
    ("efficientvit_msra", "efficientvit_m0", 128, _sized(128)),
    ("efficientvim", "efficientvim_m1", 64, {}),
    ("eva", "eva02_tiny_patch14_224", 56, _sized(56, depth=2)),
    ("fastvit", "fastvit_t8", 64, {}),
    ("fastvit", "fastvit_sa12", 64, {}),
    ("focalnet", "focalnet_tiny_srf", 64, {}),
    ("gcvit", "gcvit_xxtiny", 64, _sized(64)),
    ("hiera", "hiera_tiny_224", 64, _sized(64)),
    ("hieradet", "hieradet_small", 64, {}),
    ("iformer", "iformer_t", 64, {}),
    ("levit", "levit_128s", 64, _sized(64)),
    ("levit", "levit_conv_128s", 64, _sized(64)),
    ("lowformer", "lowformer_b0", 64, {}),
    ("maxvit", "maxvit_pico_rw_256", 64, _sized(64)),
    ("coatnet", "coatnet_pico_rw_224", 64, _sized(64)),
    ("metaformer", "poolformer_s12", 64, {}),
    ("metaformer", "poolformerv2_s12", 64, {}),
    ("metaformer", "convformer_s18", 64, {}),
    ("metaformer", "caformer_s18", 64, {}),
    ("mlp_mixer", "mixer_s32_224", 96, _sized(96)),
    ("mlp_mixer", "gmlp_ti16_224", 64, _sized(64)),
    ("mlp_mixer", "resmlp_12_224", 64, _sized(64)),
    ("mlp_mixer", "gmixer_12_224", 64, _sized(64)),
    ("mobilevit", "mobilevit_xxs", 64, {}),
    ("mobilevitv2", "mobilevitv2_050", 64, {}),
    ("mvitv2", "mvitv2_tiny", 64, _sized(64)),
    ("nest", "nest_tiny", 64, _sized(64)),
    ("nextvit", "nextvit_small", 64, {"depths": (1, 1, 5, 1)}),
    ("pit", "pit_ti_224", 64, _sized(64, depth=(1, 2, 1))),
    ("pvt_v2", "pvt_v2_b0", 64, {}),
    ("pvt_v2", "pvt_v2_b2_li", 64, _FOUR),
    ("sequencer", "sequencer2d_s", 64, _sized(64, layers=(1, 1, 2, 1))),
    ("shvit", "shvit_s1", 128, {}),
    ("swiftformer", "swiftformer_xs", 64, {}),
    ("swin", "swin_tiny_patch4_window7_224", 64, _sized(64, window_size=4, **_FOUR)),
    ("swin_s3", "swin_s3_tiny_224", 64, _sized(64, window_size=4, **_FOUR)),
    ("swinv2", "swinv2_tiny_window8_256", 64, _sized(64, window_size=4, **_FOUR)),
    ("swinv2_cr", "swinv2_cr_tiny_224", 64, _sized(64, **_FOUR)),
    ("tiny_vit", "tiny_vit_5m_224", 64, {}),
    ("tnt", "tnt_s_patch16_224", 64, _sized(64, depth=2)),
    ("twins", "twins_pcpvt_small", 64, _sized(64, **_FOUR)),
    ("twins", "twins_svt_small", 64, _sized(64, **_FOUR)),
    ("visformer", "visformer_tiny", 64, _sized(64)),
    ("volo", "volo_d1_224", 64, _sized(64)),
    ("xcit", "xcit_nano_12_p16_224", 64, _sized(64, depth=2)),
)

# Networks that torch.export does not capture, with the reason.
_NOT_EXPORTED: dict[str, str] = {}


def networks() -> list[Network]:
    """Every timm network of the zoo; names start with `timm_`."""
    found = []
    for family, architecture, size, options in (*_CONVOLUTIONAL, *_ATTENTION):
        name, inputs = f"timm_{architecture}", normal(2, 3, size, size)
        note = _NOT_EXPORTED.get(architecture, "")
        found.append(
            Network(
                name=name,
                family=family,
                build=seeded(name, _make(architecture, options), settle_on=inputs),
                inputs=inputs,
                tags=frozenset({"timm", "vision", "classifier"} | ({"no-export"} if note else set())),
                requires=("timm",),
                note=note,
            )
        )
    return found


def _make(architecture: str, options: dict[str, Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        torchvision_schemas.declare()
        import timm

        model: nn.Module = timm.create_model(architecture, pretrained=False, num_classes=10, **options)
        return model

    return make
