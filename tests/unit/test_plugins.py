"""Finding and building replaceable parts."""

import json

import pytest

from dpo_ray.plugins import bind, build, check_arguments, resolve


def loss(policy, reference, *, beta, smoothing=0.0):
    return policy - reference, beta, smoothing


class Transport:
    def __init__(self, bucket_mib: int = 64, engines: tuple[str, ...] = ()) -> None:
        self.bucket_mib = bucket_mib
        self.engines = engines


REGISTRY = {"sigmoid": loss, "disk": Transport}


def test_a_built_in_name_wins_and_an_import_path_is_imported():
    assert resolve("sigmoid", REGISTRY, "loss") is loss
    assert resolve("json:dumps", REGISTRY, "loss") is json.dumps


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (
            "sigmiod",
            r"no loss is called 'sigmiod'; did you mean 'sigmoid'\? Built in: disk, sigmoid; or give an import",
        ),
        ("zzz", r"no loss is called 'zzz'\. Built in: disk, sigmoid"),
        ("no_such_module:f", "module 'no_such_module' cannot be imported"),
        ("json:no_such_function", "module 'json' has no attribute 'no_such_function'"),
    ],
)
def test_an_unknown_name_is_rejected_with_the_accepted_ones(use, message):
    with pytest.raises(ValueError, match=message):
        resolve(use, REGISTRY, "loss")


def test_bind_leaves_the_positional_arguments_to_the_caller():
    bound = bind("sigmoid", {"beta": 0.1}, REGISTRY, "loss")
    assert bound(3, 1) == (2, 0.1, 0.0)


def test_bind_rejects_an_unknown_argument_and_prints_the_signature():
    with pytest.raises(
        ValueError, match=r"loss 'sigmoid' takes no argument 'bta'; .*sigmoid\(policy, reference, \*, beta"
    ):
        bind("sigmoid", {"beta": 0.1, "bta": 1}, REGISTRY, "loss")


def test_bind_rejects_a_missing_keyword_argument():
    with pytest.raises(ValueError, match="loss 'sigmoid' needs the argument 'beta'"):
        bind("sigmoid", {}, REGISTRY, "loss")


def test_build_passes_runtime_arguments_only_where_they_are_taken():
    built = build("disk", {"bucket_mib": 8}, REGISTRY, "transport", engines=("a",), device="cpu")
    assert (built.bucket_mib, built.engines) == (8, ("a",))


def test_build_lets_the_configured_argument_win_over_the_runtime_one():
    assert build("disk", {"engines": ("b",)}, REGISTRY, "transport", engines=("a",)).engines == ("b",)


def test_build_rejects_a_missing_argument():
    with pytest.raises(ValueError, match=r"loss 'sigmoid': missing a required argument: 'policy'; its signature is"):
        build("sigmoid", {}, REGISTRY, "loss")


def test_arguments_of_a_function_that_takes_any_are_not_checked():
    check_arguments(lambda **anything: anything, {"x": 1}, "f", "judge")


def test_a_component_that_is_not_callable_is_rejected():
    with pytest.raises(ValueError, match="judge 'm:x' is a int; it must be a function or a class"):
        check_arguments(3, {}, "m:x", "judge")  # type: ignore[arg-type]
