"""What the commands share: numbers, words for the terminal, devices."""
import argparse
import io
import sys

import pytest
import torch

from tinytav import cli


@pytest.mark.parametrize("text, fine", [("1", True), ("999", True), ("0", False), ("1000", False)])
def test_both_ends_of_a_range_belong_to_it(text, fine):
    parse = cli.number(int, 1, 999)
    if fine:
        assert parse(text) == int(text)
    else:
        with pytest.raises(argparse.ArgumentTypeError, match="is not from 1 to 999"):
            parse(text)


@pytest.mark.parametrize("text", ["inf", "nan", "-inf"])
def test_a_number_is_finite(text):
    with pytest.raises(argparse.ArgumentTypeError):
        cli.number(float, 0)(text)


@pytest.mark.parametrize("text, shown", [
    ("a \x1b[31mred\x1b[0m dog", r"a \x1b[31mred\x1b[0m dog"), ("a\rb", r"a\rb"),
    ("naïve 日本\n\tx", "naïve 日本\n\tx"), ("\u202egnp.exe", r"\u202egnp.exe"), ("\x9b2J", r"\x9b2J")])
def test_control_characters_are_shown_and_do_nothing(text, shown):
    assert cli.plain(text) == shown


def test_without_a_flag_the_best_device_is_taken_and_a_device_that_fails_is_a_sentence():
    assert cli.choose_device("cpu") == torch.device("cpu")
    with pytest.raises(cli.InputError, match="toaster cannot be used"):
        cli.choose_device("toaster")


@pytest.mark.parametrize("name, has_bf16, expected", [
    ("cuda", True, torch.bfloat16), ("cuda", False, torch.float16), ("mps", True, torch.float32)])
def test_without_a_flag_a_gpu_computes_in_the_format_that_it_has(monkeypatch, name, has_bf16, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    assert cli.choose_dtype(torch.device(name)) is expected
    assert cli.choose_dtype(torch.device(name), "fp32") is torch.float32


@pytest.mark.parametrize("error, status, said", [
    (cli.InputError("The file is broken."), 2, "error: The file is broken.\n"),
    (OSError("No space left on device"), 2, "error: No space left on device\n"),
    (torch.OutOfMemoryError("CUDA out of memory."), 2, "error: the memory is too small: CUDA out of memory."),
    (KeyboardInterrupt(), 130, "stopped\n")])
def test_what_the_user_can_mend_is_a_sentence(monkeypatch, error, status, said):
    def main():
        raise error
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), write_through=True))
    with pytest.raises(SystemExit) as end:
        cli.run(main)
    sys.stderr.seek(0)
    assert end.value.code == status and sys.stderr.read().startswith(said)


def test_a_bug_keeps_its_traceback():
    def main():
        raise RuntimeError("mat1 and mat2 do not fit")
    with pytest.raises(RuntimeError, match="mat1"):
        cli.run(main)


def test_what_small_weights_know_is_told_whatever_the_bytes_are(tmp_path):
    (tmp_path / "knows.txt").write_bytes(b"a man who skis caf\xe9 " + 500 * b"word ")
    with pytest.warns(UserWarning, match="may not know 'dragon': it draws a man who skis") as told:
        cli.warn_about_unknown_words(tmp_path, ["a dragon"])
    assert len(str(told[0].message)) < 700
