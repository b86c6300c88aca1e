"""Published weights: every tensor in its place, in networks of few channels; what does not fit is refused."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from utnetv2_fast.errors import InputError
from utnetv2_fast.models import NETWORKS, PRESETS, SegmentationNetwork, Task, build_network, load_pretrained

WIDTH = 4
HEADS = 12


def network(name: str, in_channels: int = 1, patch_size: tuple[int, ...] | None = None) -> SegmentationNetwork:
    torch.manual_seed(1)
    preset = PRESETS["acdc-2d" if NETWORKS[name].dimensions == (2,) else "lits-3d"]
    sizes = {"scales": preset.fields["scales"], "kernel_sizes": preset.fields["kernel_sizes"]}
    channels = {"in_channels": in_channels, "num_classes": 3, "fields": preset.fields}
    task = Task(dimensions=preset.dimensions, patch_size=patch_size or preset.input_size, **sizes, **channels)
    return build_network(NETWORKS[name].configure(task, WIDTH))


def vision_transformer(width: int = WIDTH) -> dict[str, np.ndarray]:
    """Numbers in the layout of R50+ViT-B_16.npz, which has a width of 64."""
    shapes: dict[str, tuple[int, ...]] = {"conv_root/kernel": (7, 7, 3, width)}
    shapes |= {f"gn_root/{part}": (1, 1, 1, width) for part in ("scale", "bias")}
    channels = width
    for block, units in ((1, 3), (2, 4), (3, 9)):
        middle = width * 2 ** (block - 1)
        for unit in range(1, units + 1):
            at = f"block{block}/unit{unit}"
            parts = {1: (1, 1, channels, middle), 2: (3, 3, middle, middle), 3: (1, 1, middle, 4 * middle)}
            named = {str(i): shape for i, shape in parts.items()}
            if unit == 1:
                named["_proj"] = (1, 1, channels, 4 * middle)
            for name, shape in named.items():
                shapes[f"{at}/conv{name}/kernel"] = shape
                shapes |= {f"{at}/gn{name}/{part}": (1, 1, 1, shape[-1]) for part in ("scale", "bias")}
            channels = 4 * middle
    tokens = HEADS * width
    shapes |= {"embedding/kernel": (1, 1, channels, tokens), "embedding/bias": (tokens,)}
    shapes["Transformer/posembed_input/pos_embedding"] = (1, 14 * 14 + 1, tokens)
    for i in range(12):
        at = f"Transformer/encoderblock_{i}"
        for projection in ("query", "key", "value"):
            shapes[f"{at}/MultiHeadDotProductAttention_1/{projection}/kernel"] = (tokens, HEADS, width)
            shapes[f"{at}/MultiHeadDotProductAttention_1/{projection}/bias"] = (HEADS, width)
        shapes[f"{at}/MultiHeadDotProductAttention_1/out/kernel"] = (HEADS, width, tokens)
        shapes[f"{at}/MultiHeadDotProductAttention_1/out/bias"] = (tokens,)
        for layer, (rows, columns) in enumerate(((tokens, 4 * tokens), (4 * tokens, tokens))):
            shapes[f"{at}/MlpBlock_3/Dense_{layer}/kernel"] = (rows, columns)
            shapes[f"{at}/MlpBlock_3/Dense_{layer}/bias"] = (columns,)
        shapes |= {f"{at}/LayerNorm_{n}/{part}": (tokens,) for n in (0, 2) for part in ("scale", "bias")}
    shapes |= {f"Transformer/encoder_norm/{part}": (tokens,) for part in ("scale", "bias")}
    shapes |= {"cls": (1, 1, tokens), "head/kernel": (tokens, 10), "head/bias": (10,)}
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def swin(width: int = WIDTH) -> dict[str, Tensor]:
    """Numbers in the layout of swin_tiny_patch4_window7_224.pth, which has 32 channels a head."""
    shapes: dict[str, tuple[int, ...]] = {"patch_embed.proj.weight": (3 * width, 3, 4, 4)}
    shapes |= {f"patch_embed.{name}": (3 * width,) for name in ("proj.bias", "norm.weight", "norm.bias")}
    for i, (heads, depth) in enumerate(zip((3, 6, 12, 24), (2, 2, 6, 2), strict=True)):
        channels = heads * width
        for j in range(depth):
            linear = {
                "attn.qkv": (3 * channels, channels),
                "attn.proj": (channels, channels),
                "mlp.fc1": (4 * channels, channels),
                "mlp.fc2": (channels, 4 * channels),
            }
            at = f"layers.{i}.blocks.{j}"
            shapes |= {f"{at}.{name}.weight": shape for name, shape in linear.items()}
            shapes |= {f"{at}.{name}.bias": shape[:1] for name, shape in linear.items()}
            shapes |= {f"{at}.norm{n}.{part}": (channels,) for n in (1, 2) for part in ("weight", "bias")}
            shapes[f"{at}.attn.relative_position_bias_table"] = (169, heads)
            shapes[f"{at}.attn.relative_position_index"] = (49, 49)
        if i < 3:
            shapes[f"layers.{i}.downsample.reduction.weight"] = (2 * channels, 4 * channels)
            shapes |= {f"layers.{i}.downsample.norm.{part}": (4 * channels,) for part in ("weight", "bias")}
    shapes |= {f"norm.{part}": (24 * width,) for part in ("weight", "bias")}
    shapes |= {"head.weight": (10, 24 * width), "head.bias": (10,)}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def vit_file(tmp_path: Path) -> Path:
    file = tmp_path / "R50+ViT-B_16.npz"
    np.savez(file, **vision_transformer())
    return file


@pytest.fixture
def swin_file(tmp_path: Path) -> Path:
    file = tmp_path / "swin_tiny_patch4_window7_224.pth"
    torch.save({"model": swin()}, file)
    return file


def changed(net: SegmentationNetwork, file: Path) -> set[str]:
    """The names of the parameters that loading replaces."""
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    load_pretrained(net, file)
    return {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize("name", ["r50-unet", "transunet"])
def test_all_but_the_decoder_comes_from_the_vision_transformer(name: str, vit_file: Path) -> None:
    net = network(name)
    encoder = {name for name, _ in net.named_parameters() if not name.startswith("decoder.")}
    assert changed(net, vit_file) == encoder


def test_tensors_of_the_vision_transformer_do_what_they_did_there(vit_file: Path) -> None:
    stored = {name: torch.from_numpy(array) for name, array in vision_transformer().items()}
    net = network("transunet")
    load_pretrained(net, vit_file)
    own = dict(net.named_parameters())
    conv = stored["block2/unit3/conv2/kernel"]  # (H, W, C_in, C_out)
    assert torch.equal(own["resnet.blocks.1.2.conv2.weight"][5, 3, 0, 2], conv[0, 2, 3, 5])
    assert torch.equal(own["resnet.blocks.2.0.gn_proj.bias"], stored["block3/unit1/gn_proj/bias"].flatten())
    assert torch.equal(own["resnet.conv_root.weight"][1, 2], stored["conv_root/kernel"][:, :, 2, 1])
    tokens, at = torch.randn(1, 5, HEADS * WIDTH), "Transformer/encoderblock_7"
    attention = f"{at}/MultiHeadDotProductAttention_1"
    query = torch.einsum("bnc,chd->bnhd", tokens, stored[f"{attention}/query/kernel"])
    query = query + stored[f"{attention}/query/bias"]
    torch.testing.assert_close(net.blocks[7].query(tokens).unflatten(2, (HEADS, WIDTH)), query)
    out = torch.einsum("bnhd,hdc->bnc", query, stored[f"{attention}/out/kernel"]) + stored[f"{attention}/out/bias"]
    torch.testing.assert_close(net.blocks[7].out(query.flatten(2)), out)
    hidden = tokens @ stored[f"{at}/MlpBlock_3/Dense_0/kernel"] + stored[f"{at}/MlpBlock_3/Dense_0/bias"]
    torch.testing.assert_close(net.blocks[7].perceptron.fc1(tokens), hidden)
    assert torch.equal(own["blocks.7.perceptron_norm.weight"], stored[f"{at}/LayerNorm_2/scale"])


def test_positions_are_interpolated_between_the_corners(vit_file: Path) -> None:
    stored = torch.from_numpy(vision_transformer()["Transformer/posembed_input/pos_embedding"])[0, 1:]
    same = network("transunet", patch_size=(224, 224))
    load_pretrained(same, vit_file)
    assert torch.equal(same.position_embedding[0], stored)
    other = network("transunet", patch_size=(256, 160))
    load_pretrained(other, vit_file)
    grid = other.position_embedding[0].unflatten(0, (16, 10))
    for row, column in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        torch.testing.assert_close(grid[row, column], stored.unflatten(0, (14, 14))[row, column])


@pytest.mark.parametrize("name", ["swinunet", "vt-unet"])
def test_swin_becomes_the_encoder_and_mirrored_the_blocks_of_the_decoder(name: str, swin_file: Path) -> None:
    stored, net = swin(), network(name)
    mirrored = {
        parameter
        for parameter, _ in net.named_parameters()
        if parameter.startswith(("patch_embed.", "layers.", "norm.")) or ".blocks." in parameter
    }
    assert changed(net, swin_file) == mirrored
    own = dict(net.named_parameters())
    for block in ("layers.2.blocks.1", "layers_up.1.blocks.1"):
        assert torch.equal(own[f"{block}.attn.qkv.weight"], stored["layers.2.blocks.1.attn.qkv.weight"])
        table = own[f"{block}.attn.relative_position_bias_table"]
        theirs = stored["layers.2.blocks.1.attn.relative_position_bias_table"]
        assert torch.equal(table.view(-1, *theirs.shape), theirs.expand(len(table) // 169, -1, -1))
    assert torch.equal(own["layers.0.downsample.reduction.weight"], stored["layers.0.downsample.reduction.weight"])


def test_a_volume_of_equal_slices_is_embedded_as_the_slice(swin_file: Path) -> None:
    """Inflated along depth, and a single channel counts as three equal ones."""
    planar, volumetric = network("swinunet"), network("vt-unet")
    load_pretrained(planar, swin_file)
    load_pretrained(volumetric, swin_file)
    image = torch.randn(1, 1, 8, 8)
    tokens = planar.patch_embed(image.expand(-1, 3, -1, -1))
    volume = volumetric.patch_embed(image[:, :, None].expand(-1, -1, 8, -1, -1))
    torch.testing.assert_close(volume[:, 1], tokens)


@pytest.mark.parametrize("name", ["transunet", "swinunet", "vt-unet"])
def test_other_numbers_of_channels_count_alike(name: str, vit_file: Path, swin_file: Path) -> None:
    """A grey image in two channels gives what it gives in three."""
    file = vit_file if name == "transunet" else swin_file
    three, two = network(name, in_channels=3), network(name, in_channels=2)
    load_pretrained(three, file)
    load_pretrained(two, file)
    first = "resnet.conv_root.weight" if name == "transunet" else "patch_embed.proj.weight"
    kernels = [net.get_parameter(first).sum(1) for net in (three, two)]
    torch.testing.assert_close(*kernels)


def refusal(net: SegmentationNetwork, file: Path) -> str:
    """The sentence that names the file, with which loading is refused; the network is left as it was."""
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(InputError) as caught:
        load_pretrained(net, file)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert str(caught.value).startswith(str(file))
    return str(caught.value)


def test_files_of_another_network_are_refused(vit_file: Path, swin_file: Path) -> None:
    assert "not R50+ViT-B_16.npz" in refusal(network("transunet"), swin_file)
    assert "not swin_tiny_patch4_window7_224.pth" in refusal(network("swinunet"), vit_file)


def test_an_absent_file_is_refused(tmp_path: Path) -> None:
    assert "no such file" in refusal(network("swinunet"), tmp_path / "absent.pth")
    assert "no such file" in refusal(network("swinunet"), tmp_path)


def test_a_network_that_takes_none_says_which_do(swin_file: Path) -> None:
    tiny = Task(2, 1, 2, (64, 64), ((2, 2),) * 4, ((3, 3),) * 5, PRESETS["tiny-2d"].fields)
    with pytest.raises(InputError, match=r"utnetv2 takes no pre-trained weights.*swinunet"):
        load_pretrained(build_network(NETWORKS["utnetv2"].configure(tiny, 0)), swin_file)


def test_weights_of_another_size_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "vit.npz", **vision_transformer(width=5))
    assert "published size" in refusal(network("transunet"), tmp_path / "vit.npz")
    torch.save({"model": swin(width=5)}, tmp_path / "swin.pth")
    assert "published size" in refusal(network("vt-unet"), tmp_path / "swin.pth")


@pytest.mark.parametrize("change", ["missing", "axes", "text"])
def test_tensors_that_are_none_of_the_published_are_refused(change: str, tmp_path: Path) -> None:
    arrays, name = vision_transformer(), "Transformer/encoderblock_11/MlpBlock_3/Dense_1/kernel"
    match change:
        case "missing":
            del arrays[name]
        case "axes":
            arrays["block1/unit1/conv1/kernel"] = np.zeros(3, np.float32)
        case "text":
            arrays[name] = np.array("weights")
    np.savez(tmp_path / "vit.npz", **arrays)
    words = f"has no {name}" if change == "missing" else "other axes"
    assert words in refusal(network("transunet"), tmp_path / "vit.npz")


class Trap:
    """Unpickled, it would leave a file behind."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Path]]:
        return (Path.touch, (self.file,))


def test_a_pickle_is_not_run(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    torch.save({"model": swin() | {"norm.weight": Trap(trap)}}, tmp_path / "swin.pth")
    assert "damaged" in refusal(network("swinunet"), tmp_path / "swin.pth")
    hostile = np.array([Trap(trap)], dtype=object)
    np.savez(tmp_path / "vit.npz", **(vision_transformer() | {"norm": hostile}))
    assert "damaged" in refusal(network("transunet"), tmp_path / "vit.npz")
    assert not trap.exists()


@pytest.mark.parametrize("kind", ["cut", "flipped", "empty", "text", "swelling", "nothing in it"])
def test_damaged_files_are_refused(kind: str, vit_file: Path, swin_file: Path) -> None:
    for name, file in (("transunet", vit_file), ("swinunet", swin_file)):
        content = file.read_bytes()
        middle = len(content) // 2
        match kind:
            case "cut":
                file.write_bytes(content[:middle])
            case "flipped":
                file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
            case "empty":
                file.write_bytes(b"")
            case "text":
                file.write_text("weights")
            case "swelling":
                with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
                    archive.writestr("cls.npy", bytes(2**24))
            case _:
                torch.save([1], file)
        assert "damaged" in refusal(network(name), file)
