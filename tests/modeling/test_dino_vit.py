"""DINO's ViT against one written from its paper's formulas in float64, and against timm's own."""

import copy
import io
import math

import pytest
import torch
from detectron2.modeling import build_backbone, build_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from unseg.checkpoint.vit import create_dino_vit
from unseg.config import load_config
from unseg.modeling import DinoViT
from unseg.modeling.backbone import dino_vit

FACETS = ("key", "query", "value", "token")
# Native, another square, a wide one, one that is cropped on both sides, strips of one row and
# column, and a grid of as many patches as the native one.
SIZES = ((224, 224), (480, 480), (352, 496), (490, 333), (16, 320), (200, 31), (112, 448))


def small_vit(dim=24, depth=3, heads=3, side=16, image=224, seed=0, **others):
    """A ViT of random weights of a size at which every one of them changes the outputs."""
    vit = VisionTransformer(
        img_size=image,
        patch_size=side,
        embed_dim=dim,
        depth=depth,
        num_heads=heads,
        num_classes=0,
        dynamic_img_size=True,
        **others,
    )
    generator = torch.Generator().manual_seed(seed)
    for parameter in vit.parameters():
        spread = 0.5 if parameter.dim() == 1 else 1 / math.sqrt(parameter[0].numel())
        parameter.data.normal_(std=max(spread, 0.05), generator=generator)
    return vit


def cubic_weights(outputs, inputs):
    """(outputs, inputs): bicubic sampling (a = -0.75, clamped) by (outputs + 0.1) / inputs."""

    def kernel(t):
        t, a = abs(t), -0.75
        if t <= 1:
            return (a + 2) * t**3 - (a + 3) * t**2 + 1
        return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0

    weights = torch.zeros(outputs, inputs, dtype=torch.float64)
    for i in range(outputs):
        x = (i + 0.5) * inputs / (outputs + 0.1) - 0.5
        for k in range(math.floor(x) - 1, math.floor(x) + 3):
            weights[i, min(max(k, 0), inputs - 1)] += kernel(x - k)
    return weights


def layer_norm(x, weight, bias):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight + bias


def oracle(vit, x, *, block, heads):
    """The four facets (B, C, h, w) in float64, all tokens and every part computed."""
    state = {name: value.double() for name, value in vit.state_dict().items()}
    weight = state["patch_embed.proj.weight"]
    C, side = weight.shape[0], weight.shape[-1]
    h, w = x.shape[2] // side, x.shape[3] // side
    x = x.double()[:, :, : h * side, : w * side]
    patches = x.reshape(len(x), 3, h, side, w, side).permute(0, 2, 4, 1, 3, 5).flatten(3)
    patches = patches @ weight.flatten(1).T + state["patch_embed.proj.bias"]  # (B, h, w, C)
    g = math.isqrt(state["pos_embed"].shape[1] - 1)
    positions = state["pos_embed"][0, 1:].reshape(g, g, C)
    if (h, w) != (g, g):
        rows, columns = cubic_weights(h, g), cubic_weights(w, g)
        positions = torch.einsum("yi,xj,ijc->yxc", rows, columns, positions)
    cls_token = (state["cls_token"] + state["pos_embed"][:, :1]).expand(len(x), 1, C)
    tokens = torch.cat((cls_token, (patches + positions).flatten(1, 2)), dim=1)
    for index in range(block + 1):
        p = {k.split(".", 2)[2]: v for k, v in state.items() if k.startswith(f"blocks.{index}.")}
        normalised = layer_norm(tokens, p["norm1.weight"], p["norm1.bias"])
        q, k, v = (
            normalised @ p["attn.qkv.weight"][i * C : (i + 1) * C].T
            + p["attn.qkv.bias"][i * C : (i + 1) * C]
            for i in range(3)
        )
        outputs = []
        for head in range(heads):
            part = slice(head * C // heads, (head + 1) * C // heads)
            scores = q[..., part] @ k[..., part].mT / math.sqrt(C // heads)
            outputs.append(scores.softmax(dim=-1) @ v[..., part])
        attended = torch.cat(outputs, dim=-1)
        tokens = tokens + attended @ p["attn.proj.weight"].T + p["attn.proj.bias"]
        hidden = layer_norm(tokens, p["norm2.weight"], p["norm2.bias"])
        hidden = hidden @ p["mlp.fc1.weight"].T + p["mlp.fc1.bias"]
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        tokens = tokens + hidden @ p["mlp.fc2.weight"].T + p["mlp.fc2.bias"]
    maps = {"key": k, "query": q, "value": v, "token": tokens}
    return {name: m[:, 1:].mT.reshape(len(x), C, h, w) for name, m in maps.items()}


def images(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("size", SIZES)
def test_every_facet_is_that_of_the_formulas(size):
    vit = small_vit().double()
    x = images(2, 3, *size, dtype=torch.float64)
    model = DinoViT(vit=vit, out_features=FACETS)
    expected = oracle(vit, x, block=2, heads=3)
    found = model(x)
    assert tuple(found) == FACETS
    for name in FACETS:
        assert found[name].shape == (2, 24, size[0] // 16, size[1] // 16)
        # torch computes the sampling weights from 1 / factor, the oracle from a quotient.
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("block", [0, 1, 2, -1, -2, -3])
@pytest.mark.parametrize("facet", FACETS)
def test_any_block(block, facet):
    vit = small_vit(side=8, image=32).double()
    x = images(1, 3, 43, 70, dtype=torch.float64)
    found = DinoViT(vit=vit, out_features=(facet,), block=block)(x)
    expected = oracle(vit, x, block=block % 3, heads=3)[facet]
    assert list(found) == [facet]
    torch.testing.assert_close(found[facet], expected, rtol=1e-9, atol=1e-9)


def test_small_16_in_float32_and_timms_own_forward_on_the_native_grid():
    torch.manual_seed(0)
    model = build_backbone(load_config("", VIT_OPTS)).eval()
    x = images(1, 3, 224, 224)
    caught = []
    model.vit.blocks[-1].attn.qkv.register_forward_hook(lambda *args: caught.append(args[2]))
    with torch.inference_mode():
        found = model(x)["key"]
        assert not caught  # a third of that matrix is multiplied, without calling the layer
        model.vit.forward_features(x)
    timms = caught[0][:, 1:, 384:768].mT.reshape(1, 384, 14, 14)
    torch.testing.assert_close(found, timms, rtol=1e-4, atol=1e-5)
    expected = oracle(model.vit, x, block=11, heads=6)["key"]
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_token_is_timms_without_the_final_norm():
    vit = small_vit().double().eval()
    x = images(2, 3, 224, 224, dtype=torch.float64)
    found = DinoViT(vit=vit, out_features=["token"])(x)["token"]
    normalised = layer_norm(found.flatten(2).mT, vit.norm.weight, vit.norm.bias)
    torch.testing.assert_close(normalised, vit.forward_features(x)[:, 1:])


def test_images_of_a_batch_do_not_mix():
    model = DinoViT(vit=small_vit().double())
    x = images(3, 3, 50, 70, dtype=torch.float64)
    torch.testing.assert_close(model(x)["key"][1:2], model(x[1:2])["key"])


def refuse(module, *_):
    raise AssertionError(f"{type(module).__name__} must not run")


def test_stops_inside_the_block():
    vit = small_vit(depth=4)
    unwanted = [vit.norm, *vit.blocks[3:]]
    for module in unwanted:
        module.register_forward_pre_hook(refuse)
    x = images(1, 3, 64, 64)
    assert DinoViT(vit=vit, out_features=("token",), block=2)(x)["token"].isfinite().all()
    for module in (vit.blocks[2].attn, vit.blocks[2].norm2, vit.blocks[2].mlp):
        module.register_forward_pre_hook(refuse)
    assert DinoViT(vit=vit, block=2)(x)["key"].isfinite().all()
    with pytest.raises(AssertionError, match="Attention must not run"):
        DinoViT(vit=vit, out_features=("key", "token"), block=2)(x)


@pytest.mark.parametrize("facets", [("key",), ("value", "query")])
def test_multiplies_only_the_wanted_thirds(facets):
    model = DinoViT(vit=small_vit(), out_features=facets, block=0)
    with FlopCounterMode(display=False) as counter:
        model(images(1, 3, 64, 96))
    patches, channels = 4 * 6, 24
    assert counter.get_total_flops() == 2 * patches * channels * (
        3 * 16 * 16 + channels * len(facets)
    )


def changes():
    def load(model):
        other = small_vit(seed=5)
        model.vit.load_state_dict(other.state_dict())

    def assign(model):
        model.vit.load_state_dict(small_vit(seed=5).state_dict(), assign=True)

    def step(optimizer, **options):
        def apply(model):
            model.vit.pos_embed.requires_grad_(True)
            model.vit.pos_embed.grad = torch.ones_like(model.vit.pos_embed)
            optimizer([model.vit.pos_embed], lr=0.5, **options).step()

        return apply

    def replace_data(model):
        model.vit.pos_embed.data = model.vit.pos_embed.data.flip(1)

    def write(model):
        with torch.inference_mode():
            model.vit.pos_embed.mul_(2)

    def average(model):  # how many write the average of a student's weights
        model.vit.pos_embed.data.mul_(0.5).add_(small_vit(seed=5).pos_embed.data)

    return {
        "load": load,
        "assign": assign,
        "sgd": step(torch.optim.SGD, foreach=False),
        "sgd_foreach": step(torch.optim.SGD, foreach=True),
        "adamw_foreach": step(torch.optim.AdamW, foreach=True),
        "adamw_fused": step(torch.optim.AdamW, fused=True),
        "data": replace_data,
        "in_place": write,
        "average": average,
        "double": lambda model: model.double(),
    }


@pytest.mark.parametrize("change", changes())
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_cached_positions_do_not_go_stale(change, mode):
    model = DinoViT(vit=small_vit())
    x = images(1, 3, 64, 96)
    with mode():
        before = model(x)["key"]
    changes()[change](model)
    x = x.to(model.vit.pos_embed.dtype)
    with mode():
        found = model(x)["key"]
        expected = DinoViT(vit=copy.deepcopy(model.vit))(x)["key"]
    assert torch.equal(found, expected)
    assert found.dtype == torch.float64 or not torch.allclose(found, before)


def test_positions_are_computed_once_per_grid(monkeypatch):
    grids = []
    original = dino_vit.interpolate_positions

    def counted(pos_embed, grid):
        grids.append(grid)
        return original(pos_embed, grid)

    monkeypatch.setattr(dino_vit, "interpolate_positions", counted)
    model = DinoViT(vit=small_vit())
    names = set(model.state_dict())
    with torch.no_grad():
        for size in ((64, 96), (96, 64), (70, 111), (64, 96)):
            model(images(1, 3, *size))
    assert grids == [(4, 6), (6, 4)]
    assert set(model.state_dict()) == names
    with torch.no_grad():
        for width in range(1, 40):
            model(images(1, 3, 16, 16 * width))
    assert len(model._cache) <= 8


def test_a_cached_grid_still_gets_gradients():
    model = DinoViT(vit=small_vit(), freeze=False)
    x = images(1, 3, 64, 96)
    with torch.inference_mode():
        cached = model(x)["key"]
    found = model(x)["key"]
    found.square().sum().backward()
    torch.testing.assert_close(found, cached)
    assert (model.vit.pos_embed.grad[:, 1:] != 0).any()
    copied = copy.deepcopy(model)
    with torch.no_grad():
        torch.testing.assert_close(copied(x)["key"], cached)
    file = io.BytesIO()
    torch.save(model, file)  # as a whole, as processes are handed models
    file.seek(0)
    with torch.no_grad():
        torch.testing.assert_close(torch.load(file, weights_only=False)(x)["key"], cached)


@pytest.mark.parametrize("facet", ["query", "token"])
def test_every_weight_that_asks_for_a_gradient_gets_one(facet):
    model = DinoViT(vit=small_vit(depth=4), out_features=(facet,), block=-2, freeze=False)
    assert model.training
    assert model.vit.training
    model(images(1, 3, 64, 96))[facet].square().sum().backward()
    asking = {n for n, p in model.vit.named_parameters() if p.requires_grad}
    assert asking == {n for n, p in model.vit.named_parameters() if p.grad is not None}
    assert {"pos_embed", "cls_token", "blocks.2.attn.qkv.weight"} <= asking
    assert ("blocks.2.mlp.fc2.weight" in asking) == (facet == "token")
    assert not any(name.startswith(("blocks.3", "norm.")) for name in asking)


def test_frozen():
    model = DinoViT(vit=small_vit(proj_drop_rate=0.5)).train()
    assert not model.training
    assert not any(module.training for module in model.modules())
    assert not any(p.requires_grad for p in model.parameters())
    x = images(1, 3, 32, 32)
    assert torch.equal(model(x)["key"], model(x)["key"])


@pytest.mark.parametrize(("arch", "channels", "heads"), [("small", 384, 6), ("base", 768, 12)])
@pytest.mark.parametrize(("side", "grid"), [(16, 14), (8, 28)])
def test_the_four_of_dino(arch, channels, heads, side, grid):
    with torch.device("meta"):
        vit = create_dino_vit(f"vit_{arch}", side)
    C = channels
    expected = {
        "cls_token": (1, 1, C),
        "pos_embed": (1, 1 + grid**2, C),
        "patch_embed.proj.weight": (C, 3, side, side),
        "patch_embed.proj.bias": (C,),
        "norm.weight": (C,),
        "norm.bias": (C,),
    }
    shapes = {
        "norm1": (C,),
        "attn.qkv": (3 * C, C),
        "attn.proj": (C, C),
        "norm2": (C,),
        "mlp.fc1": (4 * C, C),
        "mlp.fc2": (C, 4 * C),
    }
    for i in range(12):
        for name, shape in shapes.items():
            expected[f"blocks.{i}.{name}.weight"] = shape
            expected[f"blocks.{i}.{name}.bias"] = shape[:1]
    assert len(expected) == 150
    assert {k: tuple(v.shape) for k, v in vit.state_dict().items()} == expected
    model = DinoViT(vit=vit)
    assert set(model.state_dict()) == {f"vit.{name}" for name in expected}
    assert {block.attn.num_heads for block in vit.blocks} == {heads}
    assert {m.eps for m in vit.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}
    (shape,) = model.output_shape().values()
    assert (shape.channels, shape.stride) == (C, side)
    assert model.size_divisibility == 0
    assert model(torch.empty(2, 3, 100, 330, device="meta"))["key"].shape == (
        2,
        C,
        100 // side,
        330 // side,
    )


def test_nothing_is_downloaded(monkeypatch):
    import timm

    asked = []
    create = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda *a, **k: asked.append(k["pretrained"]) or create(*a, **k)
    )
    with torch.device("meta"):
        create_dino_vit("vit_small", 16)
    assert asked == [False]


@pytest.mark.parametrize("shape", [(1, 3, 15, 40), (1, 3, 40, 15), (1, 3, 0, 16), (3, 64, 64)])
def test_images_below_a_patch(shape):
    with pytest.raises(ValueError, match=r"one patch of 16 pixels.*\("):
        DinoViT(vit=small_vit())(torch.zeros(shape))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 3}, r"MODEL\.VIT\.BLOCK must lie in -3\.\.2 .*: 3"),
        ({"block": -4}, r"MODEL\.VIT\.BLOCK"),
        ({"out_features": ("key", "keys")}, r"MODEL\.VIT\.OUT_FEATURES.*'keys'"),
        ({"out_features": ()}, r"MODEL\.VIT\.OUT_FEATURES"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        DinoViT(vit=small_vit(), **options)


@pytest.mark.parametrize(
    "others",
    [
        {"reg_tokens": 2},
        {"class_token": False, "global_pool": "avg"},
        {"no_embed_class": True},
        {"pre_norm": True},
        {"qkv_bias": False},
        {"pos_embed": "none"},
        {"image": (224, 64)},
    ],
)
def test_other_transformers(others):
    with pytest.raises(ValueError, match="vit must be as DINO's"):
        DinoViT(vit=small_vit(**others))


@pytest.mark.parametrize(
    "opts", [["MODEL.VIT.ARCH", "vit_tiny"], ["MODEL.VIT.PATCH_SIZE", 14], ["MODEL.VIT.ARCH", ""]]
)
def test_unknown_vit_in_the_config(opts):
    with pytest.raises(ValueError, match=r"MODEL\.VIT\.ARCH .*PATCH_SIZE .*vit_base 8"):
        build_backbone(load_config("", [*VIT_OPTS, *opts]))


VIT_OPTS = ["MODEL.BACKBONE.NAME", "build_dino_vit_backbone", "MODEL.DEVICE", "cpu"]
DISCOVERY_OPTS = [
    *VIT_OPTS,
    "MODEL.META_ARCHITECTURE",
    "MaskDiscovery",
    "MODEL.PIXEL_STD",
    (58.395, 57.12, 57.375),
    "DISCOVERY.FREE_MASK.SCORE_THRESHOLD",
    0.0,
]


def test_mask_discovery():
    model = build_model(load_config("", [*DISCOVERY_OPTS, "DISCOVERY.IN_FEATURE", "key"])).eval()
    generator = torch.Generator().manual_seed(0)
    sizes = ((100, 132), (100, 132), (49, 90))
    inputs = [
        {"image": torch.randint(0, 256, (3, *s), dtype=torch.uint8, generator=generator)}
        for s in sizes
    ]
    seen = []
    discoverer = model.discoverer

    def spy(feature, size, *, dropped):
        seen.append(tuple(feature.shape))
        return discoverer(feature, size, dropped=dropped)

    model.discoverer = spy
    outputs = model(inputs)
    assert seen == [(384, 6, 8), (384, 6, 8), (384, 3, 5)]
    for size, output in zip(sizes, outputs, strict=True):
        assert output["instances"].pred_masks.shape[1:] == size
    assert sum(len(output["instances"]) for output in outputs) > 0
    with pytest.raises(ValueError, match="IN_FEATURE 'token'"):
        build_model(load_config("", [*DISCOVERY_OPTS, "DISCOVERY.IN_FEATURE", "token"]))
