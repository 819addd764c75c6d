"""That the table is there and whole, and what it counts; the times are the machine's affair."""
import argparse
import re
from concurrent.futures.process import BrokenProcessPool

import pytest
import tiny
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from tinytav.errors import InputError
from tinytav.inflation import inflate
from tinytav.measure import bench
from tinytav.stable_diffusion.unet import UNetConfig
from tinytav.stable_diffusion.vae import VAEConfig
from tinytav.weights import load

CPU = torch.device("cpu")
ROW = re.compile(r"(.*?)" + r" +(\d+\.\d{3})" * 2 + r" +(\d+\.\d+|nan)" + r" +(\d+)" * 2 + r" +(\d+%)" + "( .*)?")
BLOCKS = 12             # of the tiny U-Net


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return tiny.write_folder(tmp_path_factory.mktemp("bench") / "w")


@pytest.fixture
def here(monkeypatch):
    """The command in this process, on one thread and with a matrix product that takes no time: rows and status."""
    monkeypatch.setattr(bench, "measure_apart", bench.measure)
    monkeypatch.setattr(bench, "matrix_rate", lambda device, dtype: 1e9)
    monkeypatch.setattr(bench, "REPEATS", 1)

    def call(*args):
        monkeypatch.setattr("sys.argv", ["bench", "--device", "cpu", *map(str, args)])
        return bench.main()
    return call


def rows(output):
    return [match.groups() for match in map(ROW.fullmatch, output.splitlines()) if match]


def case(weights, **changes):
    given = dict(part="tuning", frames=2, size=32, device="cpu", precision="fp32", random=None, weights=weights,
                 tokenizer=None, prediction=None, vae=None, embedding=None,
                 attention="sparse-causal", checkpointing="off")
    return argparse.Namespace(**given | changes)


def test_each_part_is_measured_in_a_process_of_its_own(weights):
    line = bench.measure_apart(case(weights, part="sampling"))
    title, seconds, each, peak, flops, rate, share, note = ROW.fullmatch(line).groups()
    assert title == "" and note is None
    assert 0.05 < float(peak) < 16 and float(each) == pytest.approx(float(seconds) / 2, abs=1e-3)


def test_all_parts_are_rows(here, weights, capsys):
    assert here("--weights", weights) == 0
    out = capsys.readouterr().out
    found = rows(out)
    assert out.startswith(f"weights: {weights}\ncpu (") and "3 frames of 32x32" in out and out.count("weights:") == 1
    assert [title for title, *_ in found] == list(bench.PARTS.values())


def test_several_sizes_and_what_the_numbers_of_a_line_are(here, weights, monkeypatch, capsys):
    monkeypatch.setattr(bench, "seconds", lambda call, repeats, device: 3. if call() else 0.)
    monkeypatch.setattr(bench, "operations", lambda call: 6e9)
    monkeypatch.setattr(bench, "peak_bytes", lambda device: 2 ** 29)
    assert here("--weights", weights, "--frames", 1, 2, "--size", 16, 32, "--parts", "tuning", "--precision", "bf16",
                "--checkpointing", "on") == 0
    out = capsys.readouterr().out
    assert re.findall(r"(\d) frames of (\d+)x", out) == [("1", "16"), ("2", "16"), ("1", "32"), ("2", "32")]
    numbers = "3.000", "1.500", "0.50", "6", "2", "200%", f"  {BLOCKS} blocks computed again"
    assert rows(out)[1][1:] == numbers and len(rows(out)) == 4 and ", bf16," in out


def test_a_size_that_the_model_does_not_take_is_refused(here, weights):
    with pytest.raises(InputError, match="The size 17 does not suit this model: use a multiple of 2"):
        here("--weights", weights, "--size", 16, 17)


@pytest.mark.parametrize("flags, message", [
    (["--seed", 5], "unrecognized arguments: --seed 5"), (["--random", "sd15", "--vae", "v"], "takes no weights")])
def test_flags_that_would_do_nothing_are_refused(here, capsys, flags, message):
    with pytest.raises(SystemExit):
        here(*flags)
    assert message in capsys.readouterr().err


def test_the_median_leaves_out_the_warm_up(monkeypatch):
    clock = iter([0, 100, 200, 201, 300, 302, 400, 450])    # the warm-up takes 100, the others 1, 2, 50
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    calls = []
    assert bench.seconds(lambda: calls.append(1), repeats=3, device=CPU) == 2
    assert len(calls) == 4


def test_a_matrix_products_rate_is_two_operations_an_element_of_its_sum(monkeypatch):
    monkeypatch.setattr(bench, "seconds", lambda call, repeats, device: 2.)
    assert bench.matrix_rate(CPU, torch.float32) == 2048 ** 3


def test_operations_are_those_of_matrices_convolutions_and_attention():
    a, image, kernel = torch.ones(5, 7), torch.ones(1, 2, 8, 8), torch.ones(3, 2, 3, 3)
    assert bench.operations(lambda: a @ a.T) == 2 * 5 * 7 * 5
    assert bench.operations(lambda: torch.conv2d(image, kernel, padding=1)) == 2 * 64 * 3 * 2 * 9


def test_the_fused_attention_of_a_cpu_counts_what_its_matrix_products_count():
    q, k = torch.randn(2, 3, 64, 16, requires_grad=True), torch.randn(2, 3, 80, 16, requires_grad=True)
    product = 2 * 2 * 3 * 64 * 80 * 16
    assert bench.operations(lambda: scaled_dot_product_attention(q, k, k)) == 2 * product
    with sdpa_kernel(SDPBackend.MATH):
        assert bench.operations(lambda: scaled_dot_product_attention(q, k, k)) == 2 * product
    forward_and_back = bench.operations(lambda: scaled_dot_product_attention(q, k, k).sum().backward())
    assert forward_and_back == (2 + 5) * product            # the gradient computes the first product again


def test_a_steps_operations_are_the_nets_and_more_where_blocks_are_computed_again(weights):
    sd = load(weights)
    counted = {}
    for checkpointing in ("off", "on"):
        call, net = bench.prepare(sd, case(weights, checkpointing=checkpointing))
        counted[checkpointing] = bench.operations(call)
    x, context = torch.zeros(1, 4, 2, 16, 16), torch.zeros(1, 77, net.cfg.cross_attention_dim)
    forward = bench.operations(torch.no_grad()(lambda: inflate(sd.unet, 2)(x, torch.tensor([1]), context)))
    assert 1.5 * forward < counted["off"] < 3.1 * forward and counted["on"] > counted["off"] + 0.8 * forward
    guided = bench.operations(bench.prepare(sd, case(weights, part="sampling"))[0])
    inverted = bench.operations(bench.prepare(sd, case(weights, part="inverting"))[0])
    assert inverted == forward and guided == 2 * inverted


def test_a_system_that_does_not_tell_the_peak_gives_nan(monkeypatch, tmp_path, weights):
    monkeypatch.setattr(bench, "STATUS", tmp_path / "none")
    monkeypatch.setattr(bench, "FORGET", tmp_path / "none")
    bench.forget_peak(CPU)
    monkeypatch.setattr(bench, "REPEATS", 1)
    assert ROW.fullmatch(bench.measure(case(weights, part="encoding")))[4] == "nan"


@pytest.mark.skipif(not bench.FORGET.exists(), reason="the system does not tell")
def test_the_peak_is_the_most_that_was_held_since_it_was_forgotten():
    torch.ones(10 ** 8)                                     # 400 MB
    bench.forget_peak(CPU)
    before = bench.peak_bytes(CPU)
    torch.ones(5 * 10 ** 7)
    assert 1.5e8 < bench.peak_bytes(CPU) - before < 2.5e8


@pytest.mark.parametrize("error", [BrokenProcessPool(), MemoryError()])
def test_a_part_without_enough_memory_has_no_line_and_another_error_is_raised(monkeypatch, error):
    def fails(case):
        raise error
    monkeypatch.setattr(bench, "measure", fails)
    monkeypatch.setattr(bench, "ProcessPoolExecutor", Here)
    assert bench.measure_apart(case("w")) is None
    error = RuntimeError("a fault")                         # which `fails` raises now
    with pytest.raises(RuntimeError, match="a fault"):
        bench.measure_apart(case("w"))


def test_a_part_that_failed_is_shown_and_the_others_are_measured(here, weights, monkeypatch, capsys):
    monkeypatch.setattr(bench, "measure_apart", lambda case: None if case.part == "decoding" else bench.measure(case))
    assert here("--weights", weights, "--parts", "decoding", "encoding") == 0
    out = capsys.readouterr().out
    assert re.search("VAE, decoding the clip +the memory is too small\n", out) and len(rows(out)) == 1


class Here:
    """Stands for a pool of processes, and calls in this one."""

    def __init__(self, count, mp_context):
        self.error = None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, function, case):
        function(case)


@torch.no_grad()
def test_full_attention_takes_operations_that_grow_with_the_square_of_the_frames(weights):
    """ST-Attn has O(2 f N^2), full attention O((f N)^2): paper, section 3.2. The difference is f (f - 2) N^2."""
    sd, extra = load(weights), {}
    for frames in (2, 4, 8):
        cases = [case(weights, part="inverting", frames=frames, attention=name) for name in ("sparse-causal", "full")]
        sparse, full = (bench.operations(bench.prepare(sd, one)[0]) for one in cases)
        extra[frames] = full - sparse
    assert extra[2] == 0 and extra[8] / extra[4] == pytest.approx(8 * 6 / (4 * 2))


def test_random_weights_give_finite_answers(here, monkeypatch, capsys):
    configs = UNetConfig.from_json(tiny.UNET), VAEConfig.from_json(tiny.VAE)
    monkeypatch.setitem(bench.RANDOM, "sd15", configs)
    sd = bench.models(case(None, random="sd15", precision="bf16"))
    assert sd.unet.conv_in.weight.dtype is torch.bfloat16 and not sd.unet.conv_in.weight.requires_grad
    x = torch.randn(2, 4, 8, 8, dtype=torch.bfloat16)
    answer = sd.unet(x, torch.tensor([5, 900]), torch.randn(2, 7, 24, dtype=torch.bfloat16))
    assert answer.isfinite().all() and answer.std() > 0
    assert here("--random", "sd15", "--frames", 2, "--size", 16, "--precision", "fp32") == 0
    assert len(rows(capsys.readouterr().out)) == len(bench.PARTS)


def test_the_default_models_of_random_are_stable_diffusion_1_5s():
    unet, vae = bench.RANDOM["sd15"]
    assert unet.block_out_channels == (320, 640, 1280, 1280) and vae.factor == 8
