"""Train, export and score what a config describes."""

from __future__ import annotations

import datetime
import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from cocoa_pl.attention import Policy
from cocoa_pl.config.build import build
from cocoa_pl.config.process import check_processes, is_first_process
from cocoa_pl.config.saved import load_config, settings_of
from cocoa_pl.data.processor import Processor
from cocoa_pl.data.sampler import mix
from cocoa_pl.data.sources import HeldOutBenchmark
from cocoa_pl.distributed.collectives import rank
from cocoa_pl.embedder import Embedder, chosen_device
from cocoa_pl.errors import UserError, first_line
from cocoa_pl.evaluation import report
from cocoa_pl.evaluation.benchmark import check_subsets, score_subsets
from cocoa_pl.evaluation.vectors import IN_MEMORY, VectorSettings, embedded
from cocoa_pl.export.folder import export, untouched
from cocoa_pl.for_mteb.benchmark import MtebBenchmark
from cocoa_pl.models import adapters
from cocoa_pl.models.exported import described_in
from cocoa_pl.models.loading import ADAPTER_CONFIG, Inputs, Loaded, find_folder, load
from cocoa_pl.models.tiny import Texts
from cocoa_pl.stages import checkpoint
from cocoa_pl.stages.callbacks import check_login
from cocoa_pl.stages.recipe import Recipe, Stage
from cocoa_pl.stages.trainer import Parts, make_trainer

log = logging.getLogger(__name__)

_ADAPTER_STREAM = 5


def train(cfg: DictConfig, run_dir: Path, console: Console) -> None:
    """Run the stages of a config, export the model and score it."""
    untouched(run_dir / "model")  # refuse before training, not after hours
    stages, _ = build_stages(cfg), build(cfg.adapter)  # their mistakes show before data are read
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    parts = partial(trainer_parts, cfg, run_dir)
    for logger in plain["logger"].values():
        if logger and logger["_target_"].endswith("WandbLogger"):
            check_login(offline=bool(logger.get("offline")))
    for stage in stages:  # what Lightning refuses, it refuses here
        trainer = make_trainer(parts(stage.name), steps=1, validate_every=stage.validate_every)
        check_processes(trainer, run_dir)
    data = build(cfg.data)
    benchmark = build(cfg.benchmark) if cfg.evaluate else None  # its mistakes show before training
    if isinstance(benchmark, HeldOutBenchmark) and cfg.benchmark.data == cfg.data:
        benchmark = HeldOutBenchmark(name=benchmark.name, data=data)  # rows are read once
    loaded = open_model(cfg, data.training_texts)
    began, backbone = described_in(loaded.folder).get("lineage", []), loaded.backbone
    parameters = list(backbone.parameters())
    total = sum(p.numel() for p in parameters)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    log.info(f"{trained:,} of {total:,} parameters train ({100 * trained / total:.2f} %)")
    processor, eval_processor = make_processors(cfg, loaded)
    recipe = Recipe(
        stages=stages,
        backbone=backbone,
        processor=processor,
        data=data,
        run_dir=run_dir,
        parts=parts,
        config=plain,
        seed=cfg.seed,
        num_workers=cfg.num_workers,
        on_bad_row=cfg.on_bad_row,
        checkpoint_every=cfg.checkpoint_every,
        export=cfg.export,
    )
    lineage = recipe.run(resume=cfg.resume is not None)
    if cfg.trainer.get("fast_dev_run"):
        log.info("trainer.fast_dev_run: nothing is exported or scored")
        return
    if rank():
        return
    source = recipe.last.with_name(f"{cfg.export}.ckpt")
    if cfg.export != "last" or source.is_dir():  # of the last shards each rank holds its own
        weights, chosen = checkpoint.read_chosen(source)
        if cfg.export != "last":
            lineage[-1] |= chosen
            log.info("model/ is taken from %s, of step %d", source, chosen["steps"])
        backbone = open_model(cfg, data.training_texts).backbone
        checkpoint.load_trained(backbone, weights, where=str(source))
    backbone.compute_dtype = backbone.stock.dtype  # as whoever loads it computes
    backbone = backbone.to(scoring_device(cfg))  # the trainer leaves it on the CPU
    embedder = export(
        Embedder(backbone, eval_processor, stages[-1].policy),
        run_dir / "model",
        lineage=[*began, *lineage],
        settings=settings_of(plain),
    )
    if benchmark is not None:
        facts = {"stages": " → ".join(stage.name for stage in stages)}
        for stage in stages:
            facts[stage.name] = f"{stage.policy.name} attention, lr {stage.optimization.lr:g}"
        facts["seed"] = cfg.seed
        score(embedder, benchmark, run_dir, console, path=str(run_dir), facts=facts)


def trainer_parts(cfg: DictConfig, run_dir: Path, stage: str) -> Parts:
    """What the config says of a stage's trainer, with `${run.dir}` and `${run.stage}` filled in."""
    own: Any = OmegaConf.merge(cfg, {"run": {"dir": str(run_dir), "stage": stage}})
    made: dict[str, list[Any]] = {"callbacks": [], "logger": []}
    for group, objects in made.items():
        for name, node in own[group].items():
            try:
                objects += [] if node is None else [build(node)]
            except InstantiationException as error:  # a package that is missing, a server
                reason = first_line(error.__cause__ or error)
                raise UserError(f"{group}.{name} cannot be made: {reason}") from error
    return Parts(stage, run_dir, cfg.model.dtype, build(own.trainer), *made.values())


def build_stages(cfg: DictConfig) -> list[Stage]:
    """Build the stages that `stage.order` names; a typed word about another stage is logged.

    Raises:
        UserError: if it names one that the config does not hold, or one twice.
    """
    order = list(cfg.stage.order)
    if len(set(order)) < len(order):
        raise UserError(
            f"stage.order=[{','.join(order)}] names a stage twice; metrics know it by its name"
        )
    known = [name for name, value in cfg.stage.items() if OmegaConf.is_dict(value)]
    if missing := [name for name in order if name not in known]:
        raise UserError(f"stage.order names {missing[0]}; this config holds {', '.join(known)}")
    running = OmegaConf.to_yaml(OmegaConf.masked_copy(cfg.stage, order))
    typed = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    for word in typed if is_first_process() else []:
        key = word.partition("=")[0].rpartition("@")[2].lstrip("+~")
        of_stage = [name for name in known if key.startswith(f"stage.{name}.")]
        if of_stage and of_stage[0] not in order and key not in running:  # as of `${...}`
            log.warning("%s has no effect: stage.order is [%s]", word, ", ".join(order))
    return [build(cfg.stage[name]) for name in order]


def model_folders(cfg: DictConfig, texts: Texts) -> tuple[Path, Path | None]:
    """The folder of the model that training starts from, an earlier run's or the config's own, and
    that of an adapter on it.
    """
    if cfg.init_from is None:
        folder = build(cfg.model.source).folder(texts)
    else:
        folder = find_folder(cfg.init_from)
        log.info("starting from %s", folder)
    if not (folder / ADAPTER_CONFIG).is_file():
        return folder, None
    return find_folder(adapters.base_path(folder, copy=cfg.model.source.get("path"))), folder


def open_model(cfg: DictConfig, texts: Texts) -> Loaded:
    """The model that training starts from, with what shall train; new adapters follow from the
    run's seed alone.
    """
    base, adapter = model_folders(cfg, texts)
    loaded = load(
        base,
        kernel=cfg.model.kernel,
        dtype=cfg.model.dtype,
        gradient_checkpointing=cfg.model.gradient_checkpointing,
    )
    if adapter is not None:
        loaded = adapters.merge_adapter(loaded, adapter)
    torch.manual_seed(mix(cfg.seed, _ADAPTER_STREAM))
    return replace(loaded, backbone=build(cfg.adapter)(loaded.backbone))


def scoring_device(cfg: DictConfig) -> str:
    """Where a model is scored after training: the GPU if it was trained on one."""
    return "cpu" if cfg.trainer.accelerator == "cpu" else chosen_device("auto")


def make_processors(cfg: DictConfig, inputs: Inputs) -> list[Processor]:
    """Processors for training and for evaluation; samples end with `model.eos_token`, or with the
    tokenizer's own.

    Raises:
        UserError: if that is no special token.
    """
    tokenizer, token = inputs.tokenizer, cfg.model.eos_token
    if token is not None:
        known = list(tokenizer.added_tokens_encoder)
        if token not in known:
            raise UserError(
                f"model.eos_token={token} is no special token; there are {', '.join(known)}"
            )
        tokenizer.eos_token = token
    return [
        Processor(
            tokenizer,
            inputs.image_processor,
            max_length=cfg.model.max_length,
            min_pixels=cfg.model.min_pixels,
            max_pixels=max_pixels,
            num_token_rows=inputs.num_token_rows,
        )
        for max_pixels in (cfg.model.max_pixels, cfg.model.eval_max_pixels)
    ]


def open_embedder(path: str, *, device: str) -> Embedder:
    """A run folder, a .ckpt, an exported folder or a hub id."""
    if not path.endswith(".ckpt"):
        return Embedder.load(path, device=device)
    device = chosen_device(device)
    run_dir = Path(path).resolve().parents[1]
    content = checkpoint.read(Path(path))
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{path}: the run's config.yaml is not in {run_dir}")
    cfg = load_config(run_dir)
    cfg.model.kernel = "auto"  # training may have been elsewhere
    try:
        loaded = open_model(cfg, lambda: build(cfg.data).training_texts())
    except UserError as error:
        raise UserError(
            f"{path} holds what trained, and opens on what the run started from ({error}); the "
            f"model that the run exported stands alone: {run_dir / 'model'}"
        ) from error
    backbone = loaded.backbone
    checkpoint.check_base(content, checkpoint.base_of(backbone), where=path)
    weights = checkpoint.read_weights(Path(path), content)
    adapters.check_trained(weights, where=path)
    checkpoint.load_trained(backbone, weights, where=path)
    stage = build_stages(cfg)[content["cocoa"]["stage_index"]]
    _, processor = make_processors(cfg, loaded)
    return Embedder(backbone.to(device).eval(), processor, stage.policy)


def score(
    embedder: Embedder,
    benchmark: Any,
    run_dir: Path,
    console: Console,
    *,
    path: str,
    facts: dict[str, Any],
    vectors: VectorSettings = IN_MEMORY,
) -> None:
    """Evaluate, write results.json and report.html, and show the table.

    Of several processes, which share `vectors.store`, each embeds its part and the first scores.
    mteb scores by its own code, and has no page.

    Args:
        path: of the model, as results name it; the page shows what its folder tells.
        facts: of the model, which the page shows first.
    """
    if isinstance(benchmark, MtebBenchmark):
        benchmark.score(embedder, run_dir, console, path=path, vectors=vectors)
        return
    subsets = benchmark.subsets()
    check_subsets(subsets)
    provenance, trained = _told_by(path, facts, embedder.policy)  # damage shows before the work
    found = embedded(embedder, subsets, vectors)
    if rank():
        return
    results = score_subsets(
        found,
        subsets,
        benchmark=benchmark.name,
        checkpoint=path,
        is_partial=benchmark.is_partial,
        widths=[width for width in trained if width < embedder.dim],
    )
    results.write_json(run_dir / "results.json")
    beside = report.published_rows(results, benchmark.published)
    report.write_report(
        run_dir / "report.html",
        results,
        title=f"cocoa_pl on {benchmark.name}",
        date=datetime.date.today().isoformat(),
        provenance=provenance,
        published=beside,
    )
    console.print(report.score_table(results))
    if beside:
        console.print(report.published_table(results, beside))
    console.print(report.shown(f"report: {run_dir / 'report.html'}"), soft_wrap=True)


def _told_by(
    path: str, facts: dict[str, Any], policy: Policy
) -> tuple[report.Provenance, list[int]]:
    """What the folder of a model tells of it: of a run stages, config and losses; and the leading
    components that the last stage trained too, as its config or, of a model that has left its run,
    `cocoa.json` says.
    """
    is_checkpoint = path.endswith(".ckpt")  # whose weights no folder describes
    run = Path(path).resolve().parents[1] if is_checkpoint else Path(path)
    config, metrics = run / "config.yaml", run / "metrics.csv"
    lineage = [] if is_checkpoint else described_in(find_folder(path)).get("lineage", [])
    policies, last = {"evaluation": policy}, lineage[-1] if lineage else {}
    if (stages := load_config(run).get("stage")) is not None:
        policies = {name: build(stages[name].policy) for name in stages.order}
        last = stages[stages.order[-1]].module
    provenance = report.Provenance(
        facts=facts,
        lineage=lineage,
        policies=policies,
        config=config.read_text(encoding="utf-8") if config.is_file() else None,
        metrics_csv=metrics if metrics.is_file() else None,
    )
    return provenance, sorted(last.get("matryoshka_dims", []))
