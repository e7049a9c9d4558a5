"""Samples follow from seed and number alone; folders say what cannot be used."""

import itertools
import pickle
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from claritycore.images import Picture, read_image, write_image
from claritycore.training.batches import Batches
from claritycore.training.data import ImageFolder, TrainingSamples, mixed
from claritycore.training.image_files import LOW_RESOLUTION, holds_word


@pytest.fixture
def folder(tmp_path):
    """Four images of different sizes, one grey and one of 16 bits, in two folders."""
    shapes = {"a.png": (3, 40, 52), "b.png": (1, 33, 47), "sub/c.png": (3, 64, 32), "sub/d.jpg": (3, 50, 50)}
    for number, (name, shape) in enumerate(shapes.items()):
        path = tmp_path / "clean" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.rand(1, *shape, generator=torch.Generator().manual_seed(number))
        write_image(path, Picture(pixels, depth=16 if name == "sub/c.png" else 8))
    return tmp_path / "clean"


def test_a_folder_holds_its_images_at_their_depth(folder):
    images = ImageFolder(folder)
    assert [path.name for path in images.paths] == ["a.png", "b.png", "c.png", "d.jpg"]
    assert [image.dtype for image in map(images.__getitem__, range(4))] == [torch.uint8] * 2 + [
        torch.float32,
        torch.uint8,
    ]
    assert torch.equal(images[0], (read_image(folder / "a.png").pixels[0] * 255).round().byte())
    assert torch.equal(images[1][0], images[1][2])
    grey = ImageFolder(folder, channels=1)
    assert grey[0].shape == (1, 40, 52)


def test_what_was_decoded_is_kept_within_its_room(folder):
    images = ImageFolder(folder, cache_bytes=3 * 40 * 52 + 3 * 33 * 47)
    first = images[0]
    assert images[0] is first
    images[1], images[3]
    assert images._held <= images.cache_bytes
    assert images[0] is not first
    assert torch.equal(images[0], first)


@given(number=st.integers(0, 10_000), seed=st.integers(0, 2**40))
def test_a_sample_is_a_crop_turned(number, seed, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "one"
    if not path.exists():
        path.mkdir()
        write_image(path / "x.png", Picture(torch.rand(1, 3, 24, 31)))
    images = ImageFolder(path)
    sample = TrainingSamples(images, patch_size=16, scale=4, seed=seed)[number]
    assert sample.clean.shape == (3, 16, 16)
    whole = images[0] / 255
    crops = (whole[:, i : i + 16, j : j + 16] for i, j in itertools.product(range(0, 9, 4), range(0, 16, 4)))
    turned = (t for c in crops for f in (c, c.flip(1), c.flip(2), c.flip(1, 2)) for t in (f, f.transpose(1, 2)))
    assert any(torch.equal(sample.clean, t) for t in turned)


def test_a_shrunk_sample_is_a_larger_crop_made_smaller(tmp_path):
    """Of a ramp along the width: how steep a sample is tells by how much it was shrunk."""
    ramp = torch.arange(160.0).expand(3, 100, 160) / 255
    write_image(tmp_path / "x.png", Picture(ramp[None].contiguous()))
    samples = TrainingSamples(ImageFolder(tmp_path), patch_size=32, scale=2, shrink=0.5)
    factors = []
    for number in range(60):
        clean = samples[number].clean
        assert clean.shape == (3, 32, 32)
        torch.testing.assert_close(255 * clean, (255 * clean).round(), rtol=0, atol=1e-4)
        inner = 255 * clean[0, 8:24, 8:24]
        steepest = max((inner[:, -1] - inner[:, 0]).abs().max(), (inner[-1] - inner[0]).abs().max()).item() / 15
        factors.append(1 / steepest)
    assert 0.48 < min(factors) < 0.56
    assert 0.94 < max(factors) < 1.04
    assert 0.65 < sum(factors) / len(factors) < 0.85
    again = TrainingSamples(ImageFolder(tmp_path), patch_size=32, scale=2, shrink=0.5)
    assert torch.equal(again[59].clean, clean)


def test_an_image_that_is_too_small_to_be_shrunk_so_far_is_shrunk_less(tmp_path):
    write_image(tmp_path / "x.png", Picture(torch.rand(1, 3, 40, 36)))
    samples = TrainingSamples(ImageFolder(tmp_path), patch_size=32, shrink=0.1)
    assert {samples[number].clean.shape for number in range(20)} == {(3, 32, 32)}


def test_samples_follow_from_seed_and_number_alone(folder):
    first, again = (TrainingSamples(ImageFolder(folder), patch_size=32, scale=2, seed=5) for _ in range(2))
    backwards = {n: again[n] for n in reversed(range(40))}
    for n in range(40):
        assert torch.equal(first[n].clean, backwards[n].clean)
        assert first[n].seed == backwards[n].seed
    other = TrainingSamples(ImageFolder(folder), patch_size=32, scale=2, seed=6)
    assert any(first[n].seed != other[n].seed for n in range(4))
    assert len({first[n].seed for n in range(1000)}) == 1000


def test_every_image_comes_once_a_round_in_changing_order(folder):
    samples = TrainingSamples(ImageFolder(folder), patch_size=32)
    rounds = [[samples._image_of(4 * r + i) for i in range(4)] for r in range(50)]
    assert all(sorted(order) == [0, 1, 2, 3] for order in rounds)
    assert len({tuple(order) for order in rounds}) > 10


@pytest.mark.parametrize("ending", ["", "x2"])
def test_pairs_are_cropped_and_turned_together(folder, tmp_path, ending):
    for path in folder.rglob("*.*"):
        pixels = read_image(path).pixels
        target = tmp_path / "small" / path.relative_to(folder).with_name(f"{path.stem}{ending}.png")
        target.parent.mkdir(parents=True, exist_ok=True)
        height, width = (size // 2 for size in pixels.shape[2:])
        write_image(target, Picture(pixels[..., : 2 * height : 2, : 2 * width : 2], depth=16))
    samples = TrainingSamples(ImageFolder(folder), ImageFolder(tmp_path / "small"), patch_size=16, scale=2)
    for n in range(40):
        # A flip moves which of each two pixels was kept: the kept ones are in one of the four cosets.
        cosets = [samples[n].clean[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
        assert min((c - samples[n].degraded).abs().max() for c in cosets) < 1e-4


@pytest.mark.parametrize(("processes", "accumulate"), [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_all_processes_and_micro_batches_share_the_same_step(processes, accumulate):
    shares = [
        list(Batches(12, 3, 6, rank=rank, processes=processes, accumulate=accumulate)) for rank in range(processes)
    ]
    assert all(len(share) == 3 * accumulate for share in shares)
    for step in range(3):
        micro = [share[step * accumulate + m] for share in shares for m in range(accumulate)]
        assert sorted(itertools.chain(*micro)) == list(range(12 * (3 + step), 12 * (4 + step)))


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_change_nothing(folder, workers):
    samples = TrainingSamples(ImageFolder(folder), patch_size=32, scale=2, seed=1)
    loader = DataLoader(samples, batch_sampler=Batches(4, 2, 4), num_workers=workers)
    batches = list(loader)
    assert [tuple(batch.seed.tolist()) for batch in batches] == [
        tuple(samples[n].seed for n in range(first, first + 4)) for first in (8, 12)
    ]
    assert torch.equal(batches[1].clean[2], samples[14].clean)


def test_samples_can_be_pickled(folder):
    samples = TrainingSamples(ImageFolder(folder), patch_size=32)
    assert torch.equal(pickle.loads(pickle.dumps(samples))[3].clean, samples[3].clean)


def test_mixing_depends_on_every_number():
    values = {mixed(a, b, c) for a in range(10) for b in range(10) for c in range(10)}
    assert len(values) == 1000
    assert all(0 <= value < 2**63 for value in values)
    ones = sum(value.bit_count() for value in values) / 1000
    assert 30 < ones < 33


def test_unusable_images_are_named_counted_and_skipped_on_request(folder):
    (folder / "bad.png").write_bytes(b"no image")
    (folder / "empty.jpg").write_bytes(b"")
    write_image(folder / "small.png", Picture(torch.rand(1, 3, 8, 90)))
    with pytest.raises(ValueError, match=r"3 of 7 images in .* cannot be used; the first: .*bad.png"):
        ImageFolder(folder, at_least=32)
    images = ImageFolder(folder, at_least=32, skip_unusable=True)
    assert len(images) == 4
    assert "is 90 x 8, and 32 x 32 are needed" in images.unusable[folder / "small.png"]
    only = folder / "only"
    only.mkdir()
    (folder / "bad.png").rename(only / "bad.png")
    with pytest.raises(ValueError, match="1 of 1 images"):
        ImageFolder(only, skip_unusable=True)


def test_sub_folders_of_degraded_images_are_left_out_and_counted(folder):
    for name in ("LR_bicubic/X2", "sub/lq", "colour", "valid"):
        (folder / name).mkdir(parents=True)
        write_image(folder / name / "e.png", Picture(torch.rand(1, 3, 40, 40)))
    images = ImageFolder(folder)
    kept = ["a.png", "b.png", "colour/e.png", "sub/c.png", "sub/d.jpg", "valid/e.png"]
    assert [path.relative_to(folder).as_posix() for path in images.paths] == kept
    assert images.left_out == {"LR_bicubic": 1, "sub/lq": 1}
    assert images.told() == [f"2 images of {folder} are left out by the names of their folders: LR_bicubic, sub/lq"]
    assert len(ImageFolder(folder, leave_out=())) == 8
    assert len(ImageFolder(folder / "LR_bicubic")) == 1  # named itself, it is what is wanted
    (folder / "LR_bicubic").rename(folder.parent / "only")
    (folder.parent / "only" / "X2").rename(folder.parent / "only" / "LRbicx2")
    with pytest.raises(ValueError, match="only holds no image file but in LRbicx2, which are left out by their names"):
        ImageFolder(folder.parent / "only")


@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        ("DIV2K_train_LR_bicubic", True),
        ("Flickr2K_LR_bicubic", True),
        ("LRbicx4", True),
        ("lr_x4", True),
        ("LRx2", True),
        ("train-LQ", True),
        ("DIV2K_train_HR", False),
        ("color", False),
        ("lrose", False),
        ("GT", False),
    ],
)
def test_which_names_tell_degraded_images(name, left_out):
    assert holds_word(name, LOW_RESOLUTION) == left_out


def test_an_image_that_is_skipped_takes_its_partner_along(folder, tmp_path):
    for path in folder.rglob("*.*"):
        target = tmp_path / "small" / path.relative_to(folder).with_suffix(".png")
        target.parent.mkdir(parents=True, exist_ok=True)
        write_image(target, Picture(read_image(path).pixels[..., ::2, ::2]))
    write_image(folder / "b.png", Picture(torch.rand(1, 3, 34, 48)), overwrite=True)
    (folder / "a.png").write_bytes(b"no image")
    (tmp_path / "small" / "sub" / "d.png").write_bytes(b"no image")
    options = {"skip_unusable": True}
    samples = TrainingSamples(
        ImageFolder(folder, **options), ImageFolder(tmp_path / "small", **options), patch_size=16, scale=2
    )
    assert [path.name for path in samples.clean.paths] == ["b.png", "c.png"]
    assert [path.name for path in samples.degraded.paths] == ["b.png", "c.png"]
    assert len(samples) == 2


def test_an_image_that_proves_damaged_is_named_or_makes_room_for_the_next(folder, caplog):
    whole = (folder / "sub" / "d.jpg").read_bytes()
    (folder / "sub" / "d.jpg").write_bytes(whole[: len(whole) // 2])
    samples = TrainingSamples(ImageFolder(folder), patch_size=32)
    with pytest.raises(ValueError, match=r"d.jpg is damaged or cut short"):
        list(map(samples.__getitem__, range(4)))
    samples = TrainingSamples(ImageFolder(folder, skip_unusable=True), patch_size=32)
    assert all(samples[n].clean.isfinite().all() for n in range(8))
    assert [re.sub(r"\(.*", "", message) for message in caplog.messages] == [
        f"left out: {folder}/sub/d.jpg is damaged or cut short "
    ]


def test_folders_that_are_of_no_use(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        ImageFolder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no image file \(\.png"):
        ImageFolder(tmp_path / "empty")
    with pytest.raises(ValueError, match="channels must be 1 or 3"):
        ImageFolder(folder, channels=4)


def test_pairs_that_do_not_match(folder, tmp_path):
    images = ImageFolder(folder)
    with pytest.raises(ValueError, match=r"is 52 x 40, and 26 x 20 fit a.png at scale 2"):
        TrainingSamples(images, ImageFolder(folder), patch_size=32, scale=2)
    (tmp_path / "less").mkdir()
    write_image(tmp_path / "less" / "a.png", Picture(torch.rand(1, 3, 20, 26)))
    with pytest.raises(ValueError, match=r"3 of the images in .* have no partner; the first: .*/b\.png$"):
        TrainingSamples(images, ImageFolder(tmp_path / "less"), patch_size=32, scale=2)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda images: TrainingSamples(images, patch_size=30, scale=4),
            "patch_size must be a multiple of the scale 4",
        ),
        (lambda images: TrainingSamples(images, patch_size=32, shrink=0), r"shrink must be in \(0, 1\], .* got 0"),
        (lambda images: TrainingSamples(images, images, patch_size=32, shrink=0.5), "and 1 for pairs, got 0.5"),
        (lambda images: Batches(5, 0, 1, processes=2), r"batch_size must be a multiple of 2 process\(es\) times 1"),
        (lambda images: Batches(4, 0, 1, accumulate=3), r"batch_size must be a multiple of .* 3 micro-batch\(es\)"),
    ],
)
def test_sizes_that_do_not_fit(folder, build, message):
    with pytest.raises(ValueError, match=message):
        build(ImageFolder(folder))


def test_of_images_without_partner_one_of_each_side_is_named(folder, tmp_path):
    (tmp_path / "others").mkdir()
    for name in ("a.png", "z.png"):
        write_image(tmp_path / "others" / name, Picture(torch.rand(1, 3, 40, 52)))
    with pytest.raises(ValueError, match=r"4 of the images in .*; the first: .*/b\.png and .*others/z\.png$"):
        TrainingSamples(ImageFolder(folder), ImageFolder(tmp_path / "others"), patch_size=32)


def test_what_was_decoded_before_pairs_were_made_is_that_of_its_path(folder, tmp_path):
    (tmp_path / "less").mkdir()
    for path in sorted(folder.rglob("*.*"))[1:]:
        (tmp_path / "less" / path.relative_to(folder)).parent.mkdir(exist_ok=True)
        (tmp_path / "less" / path.relative_to(folder)).write_bytes(path.read_bytes())
    (folder / "a.png").write_bytes(b"no image")
    (tmp_path / "less" / "a.png").write_bytes((folder / "b.png").read_bytes())
    clean, degraded = ImageFolder(folder, skip_unusable=True), ImageFolder(tmp_path / "less")
    before = degraded[0], degraded[1]
    samples = TrainingSamples(clean, degraded, patch_size=8)
    assert [path.name for path in degraded.paths] == ["b.png", "c.png", "d.jpg"]
    assert torch.equal(samples.degraded[0], before[1])


def test_two_files_that_would_be_partners_of_one_are_refused(folder, tmp_path):
    (tmp_path / "others").mkdir()
    for name in ("a.png", "a.jpg"):
        write_image(tmp_path / "others" / name, Picture(torch.rand(1, 3, 40, 52)))
    told = r"a\.jpg and .*a\.png would both be the partner of one image"
    with pytest.raises(ValueError, match=told):
        TrainingSamples(ImageFolder(folder), ImageFolder(tmp_path / "others"), patch_size=32)


def test_an_image_smaller_than_a_crop_is_named(folder):
    samples = TrainingSamples(ImageFolder(folder), patch_size=48)
    with pytest.raises(ValueError, match=r"(a|b|c)\.png is \d+ x \d+, smaller than patch_size 48"):
        [samples[number] for number in range(4)]
