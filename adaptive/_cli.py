"""The command line: ``adaptive demo | calibrate | generate | inspect | report``."""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from adaptive.calibration import CertificateError, InvalidArgumentError, minimum_units
from adaptive.calibration._validation import check_count, check_rng

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from adaptive._display_depth import TokenDepthDisplay
    from adaptive.policies import Policy

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Early exits that keep their promise: calibrate a stopping policy, then generate with it.",
)
_Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]
_Model = Annotated[
    str, typer.Option("--model", help="Directory or hub name of a causal language model.")
]


@app.callback()
def _start(
    verbose: Annotated[bool, typer.Option("--verbose", help="Log what is being done.")] = False,
    imports: Annotated[
        list[Path] | None,
        typer.Option(
            "--import", help="Python file with rules or scores of yours; can be given repeatedly."
        ),
    ] = None,
) -> None:
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s")
    for path in imports or ():
        _import(path)


@app.command()
def demo(
    risk: Annotated[float, typer.Option(help="Promised share of tokens that may differ.")] = 0.1,
    delta: Annotated[float, typer.Option(help="Probability that calibration is misled.")] = 0.05,
    units: Annotated[int, typer.Option(help="Prompts to calibrate on.")] = 280,
    fresh: Annotated[int, typer.Option(help="Fresh prompts to check on.")] = 120,
    new_tokens: Annotated[int, typer.Option(help="Tokens generated per prompt.")] = 24,
    out: Annotated[Path, typer.Option(help="Where policies and the plot are written.")] = Path(
        "adaptive-demo"
    ),
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    quiet: _Quiet = False,
) -> None:
    """Calibrate the shipped model on real text and check the promise on fresh prompts."""
    _check(risk, delta)
    check_count("units", units, least=2)
    check_count("fresh", fresh, least=2)
    check_rng(seed)
    from adaptive._demo import run_demo

    run_demo(
        risk=risk,
        delta=delta,
        units=units,
        fresh=fresh,
        new_tokens=new_tokens,
        out=out,
        rng=seed,
        progress=not quiet,
        console=Console(),
    )


@app.command()
def calibrate(
    model: _Model,
    prompts: Annotated[
        Path, typer.Option(help="Text file (a prompt a line) or JSONL with `prompt` or `messages`.")
    ],
    out: Annotated[
        Path, typer.Option(help="Directory for the policy (and for exits trained here).")
    ],
    policy: Annotated[
        Path | None,
        typer.Option(help="Directory of a saved policy whose family is calibrated anew."),
    ] = None,
    risk: Annotated[float, typer.Option(help="Promised risk.")] = 0.05,
    delta: Annotated[float, typer.Option(help="Probability that calibration is misled.")] = 0.05,
    loss: Annotated[
        str, typer.Option(help="disagreement, departure, token_f1, rouge_l or edit.")
    ] = "disagreement",
    mode: Annotated[str, typer.Option(help="exact, propagate, or auto.")] = "auto",
    new_tokens: Annotated[int, typer.Option(help="Tokens generated per prompt.")] = 64,
    batch_size: Annotated[int, typer.Option(help="Prompts decoded together.")] = 8,
    device: Annotated[str | None, typer.Option(help="Device, such as cuda.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    quiet: _Quiet = False,
) -> None:
    """Certify the cheapest stopping policy for a model on prompts of yours."""
    _check(risk, delta)
    items = read_prompts(prompts)
    needed = minimum_units(risk, delta, loss_type="binary" if loss == "departure" else "bounded")
    typer.echo(
        f"This promise needs at least {needed} prompts in the test split alone; "
        f"{len(items)} given in all.",
        err=True,
    )
    from adaptive._calibrate import calibrate as certify
    from adaptive._exits import get_exits
    from adaptive.policies import Policy

    family = None if policy is None else Policy.from_pretrained(policy)
    loaded, tokenizer = _load(model, exits=policy)
    had_exits = get_exits(loaded) is not None
    certified = certify(
        loaded,
        items,
        risk,
        delta,
        policy=family,
        loss=loss,  # type: ignore[arg-type]
        mode=None if mode == "auto" else mode,  # type: ignore[arg-type]
        new_tokens=new_tokens,
        batch_size=batch_size,
        tokenizer=tokenizer,
        device=device,
        rng=seed,
        progress=not quiet,
    )
    exits = get_exits(loaded)
    if not had_exits and exits is not None:
        exits.save_pretrained(out)
    path = certified.save_pretrained(out)
    console = Console()
    console.print(str(certified.certificate))
    console.print(f"Written to {path}.")


@app.command()
def generate(
    model: _Model,
    policy: Annotated[Path, typer.Option(help="Directory of a saved policy.")],
    prompt: Annotated[str, typer.Option(help="The prompt.")],
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 64,
    uncertified: Annotated[
        bool, typer.Option("--uncertified", help="Go on where the certificate does not apply.")
    ] = False,
) -> None:
    """Generate text under a saved policy."""
    check_count("new_tokens", new_tokens)
    from adaptive._generate import generate as decode
    from adaptive._output import AdaptiveOutput
    from adaptive.policies import Policy

    saved = Policy.from_pretrained(policy)
    loaded, tokenizer = _load(model, exits=policy)
    output = decode(
        loaded,
        **_encoded(tokenizer, prompt),
        policy=saved,
        certified=not uncertified,
        tokenizer=tokenizer,
        max_new_tokens=new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
    )
    assert isinstance(output, AdaptiveOutput)
    typer.echo(tokenizer.decode(output.sequences[0], skip_special_tokens=True))
    layers = loaded.config.num_hidden_layers
    state = "certified" if output.certified else "not certified"
    typer.echo(f"[mean depth {output.mean_depth:.2f} of {layers} layers, {state}]", err=True)


@app.command()
def inspect(
    policy: Annotated[
        Path, typer.Argument(help="Directory of a saved policy, or its policy.json.")
    ],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the whole certificate as JSON.")
    ] = False,
) -> None:
    """Say what a saved policy's certificate promises, and on what evidence."""
    from adaptive.policies import Policy

    saved = Policy.from_pretrained(policy)
    certificate = saved.certificate
    if certificate is None:
        raise CertificateError(f"the policy in {policy} has no certificate")
    if as_json:
        typer.echo(certificate.to_json())
        return
    console = Console()
    console.print(certificate.statement())
    console.print(f"rule: {saved.rule}; mode: {saved.mode}; asked at exits {saved.stages}")
    for title, values in (
        ("decoding", certificate.decoding),
        ("fingerprints", certificate.fingerprints),
        ("versions", certificate.versions),
    ):
        console.print(
            f"{title}: " + ", ".join(f"{name} = {value}" for name, value in values.items())
        )
    console.print(f"created: {certificate.created}")


@app.command()
def report(
    policy: Annotated[Path, typer.Argument(help="Directory of a saved policy.")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    model: Annotated[
        str | None, typer.Option(help="Model to generate examples with, directory or hub name.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Prompt of an example; may be given several times.")
    ] = None,
) -> None:
    """Write a calibration's report: one self-contained HTML page."""
    if bool(prompt) != bool(model):
        raise InvalidArgumentError("prompt", prompt, "given together with `model`")
    from adaptive._report import calibration_report
    from adaptive.policies import Policy

    saved = Policy.from_pretrained(policy)
    examples = [] if model is None else _examples(model, saved, policy, prompt or [])
    page = calibration_report(saved, examples=examples)
    partial = out.with_name(f".{out.name}.partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(out)
    Console().print(f"Written to {out}.")


def _examples(
    name: str, policy: Policy, folder: Path, prompts: list[str]
) -> list[TokenDepthDisplay]:
    """Generate as the certificate says, or 64 tokens where it does not say."""
    from adaptive._display_depth import TokenDepthDisplay
    from adaptive._generate import generate as decode
    from adaptive._output import AdaptiveOutput

    loaded, tokenizer = _load(name, exits=folder)
    certificate = policy.certificate
    decoding = {} if certificate is None else certificate.decoding
    found = []
    for prompt in prompts:
        output = decode(
            loaded,
            **_encoded(tokenizer, prompt),
            policy=policy,
            certified=False,
            max_new_tokens=int(decoding.get("max_new_tokens", 64)),
            do_sample=False,
            return_dict_in_generate=True,
        )
        assert isinstance(output, AdaptiveOutput)
        found.append(TokenDepthDisplay.from_output(output, loaded, tokenizer=tokenizer))
    return found


def read_prompts(path: Path) -> list[Any]:
    """Read prompts from a file: a line each, or one JSON value a line for ``.jsonl``.

    Raises
    ------
    InvalidArgumentError
        If there is no such file, it is empty, or a line is not JSON where it should be.
    """
    if not path.is_file():
        raise InvalidArgumentError("prompts", str(path), "an existing file")
    try:
        # not `splitlines`, which also breaks at separators that a JSON text may hold
        numbered = list(enumerate(path.read_text(encoding="utf-8").split("\n"), start=1))
    except UnicodeDecodeError as error:
        raise InvalidArgumentError("prompts", str(path), "text in UTF-8") from error
    lines = [(number, line) for number, line in numbered if line.strip()]
    if not lines:
        raise InvalidArgumentError("prompts", str(path), "a file with at least one prompt")
    if path.suffix != ".jsonl":
        return [line for _, line in lines]
    items = []
    for number, line in lines:
        try:
            items.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise InvalidArgumentError(
                "prompts", f"line {number} of {path}", "a JSON value on every line"
            ) from error
    return items


def _import(path: Path) -> None:
    """Run a Python file, so that saved policies find the classes it defines."""
    name = f"_imported_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise InvalidArgumentError("import", str(path), "an existing Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


def _load(name: str, *, exits: Path | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load model and tokenizer as any Hugging Face model is, and exits from a folder with some."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InvalidArgumentError(
            "model", name, f"a causal language model that can be loaded ({reason})"
        ) from error
    if exits is not None and (exits / "exits.json").is_file():
        from adaptive._exits import attach_exits

        attach_exits(model, exits)
    return model.eval(), tokenizer


def _encoded(tokenizer: PreTrainedTokenizerBase, prompt: str) -> dict[str, Any]:
    """Turn a prompt into model inputs of one row."""
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if inputs["input_ids"].shape[1] == 0:
        raise InvalidArgumentError("prompt", prompt, "a text of at least one token")
    return dict(inputs)


def _check(risk: float, delta: float) -> None:
    for name, value in (("risk", risk), ("delta", delta)):
        if not 0 < value < 1:
            raise InvalidArgumentError(name, value, "in (0, 1)")
