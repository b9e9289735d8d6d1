"""A recipe's stages in order, each skipped if already finished: data, stage 1, stage 2, evaluation."""

import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hydra_rlhf.config import Recipe, SupervisedConfig
from hydra_rlhf.config_checks import parse_bytes
from hydra_rlhf.data.formats import ChatFormat, chat_format
from hydra_rlhf.data.scratch_tokenizer import scratch_tokenizer
from hydra_rlhf.errors import ConfigError, OutOfMemoryError
from hydra_rlhf.model.device import SCRATCH, with_dtype
from hydra_rlhf.model.export import STAGE1_ADAPTER, load_peft_adapter, save_stage1
from hydra_rlhf.model.hydra import HydraModel
from hydra_rlhf.model.load import load_tokenizer, load_trunk, scratch_trunk
from hydra_rlhf.model.lora import check_rank, find_linears
from hydra_rlhf.model.roles import STAGE1_TABLES, STAGE2, method_table, stage1_models
from hydra_rlhf.model.trunk import Trunk
from hydra_rlhf.runtime.determinism import ask_for_determinism
from hydra_rlhf.runtime.randomness import seed_for
from hydra_rlhf.runtime.run import Run, is_run_folder, read_recipe
from hydra_rlhf.stages import hydra_sft, reward_model, sft
from hydra_rlhf.stages.datasets import Datasets, RawData, load_raw, tokenize
from hydra_rlhf.stages.examples import Example
from hydra_rlhf.stages.finish import evaluate_run, record_costs, save_policy
from hydra_rlhf.stages.fits_model import check_datasets
from hydra_rlhf.stages.job import Job
from hydra_rlhf.stages.limits import is_out_of_memory
from hydra_rlhf.stages.quantized_start import check_packages, check_quantization, check_start_base
from hydra_rlhf.stages.scoring.kinds import open_sources
from hydra_rlhf.stages.session import Session
from hydra_rlhf.stages.settle import settle_supervised
from hydra_rlhf.stages.stage2 import TRAIN
from hydra_rlhf.stages.supervised import Loss, train_supervised

UNCUT = (
    "memory ran out where work cannot be cut into smaller parts, loading a model or in an optimizer's step ({}); free "
    "memory and go on with --resume, or begin anew with a smaller lora.rank, ppo.optimizer=adamw-8bit, "
    "model.dtype=bfloat16 or model.quantization=nf4: `hydra-rlhf plan RECIPE` says what would fit"
)
ALL_STAGES = ("sft", "reward_model", "hydra_sft", "ppo", "preference", "evaluation")


def run_recipe(
    recipe: Recipe, *, resume: bool = False, until: str = "evaluation", trust_remote_code: bool = False
) -> Path:
    """Run a recipe up to and including stage `until`; returns the run folder.

    Settings and data are checked before the run folder is made or any weight is loaded.
    """
    recipe = with_settled_dtype(recipe)
    check_start(recipe)
    stages = (*stage1_models(method_table(recipe)), STAGE2[recipe.method], "evaluation")
    if until not in stages:
        raise ConfigError(f"method={recipe.method} has no stage {until}; it has {', '.join(stages)}")
    with ExitStack() as stack:
        sources = stack.enter_context(
            open_sources(recipe.ppo.reward, model=recipe.model, trust_remote_code=trust_remote_code)
        )
        raw = load_raw(recipe.data, seed=recipe.seed)
        started = time.monotonic()
        run = stack.enter_context(Run.open(recipe, resume=resume))
        settle_machine(run)
        job = Job(
            recipe=recipe,
            run=run,
            session=Session(run),
            raw=raw,
            tokenizer=find_tokenizer(recipe, run, raw, trust_remote_code=trust_remote_code),
            sources=sources,
            trust_remote_code=trust_remote_code,
        )
        try:
            run_stages(job, ALL_STAGES.index(until))
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise OutOfMemoryError(UNCUT.format(str(error).strip().partition("\n")[0])) from error
            raise
        finally:
            record_costs(run, job.session, time.monotonic() - started)
    return run.folder


def with_settled_dtype(recipe: Recipe) -> Recipe:
    """The recipe with a dtype in place of `auto`: that of its run where there is one, else what suits this machine."""
    folder, model = Path(recipe.output_dir) / recipe.name, with_dtype(recipe.model)
    if recipe.model.dtype == "auto" and is_run_folder(folder):
        begun = read_recipe(folder).model
        if begun.path == model.path:
            model = replace(model, dtype=begun.dtype)
    return replace(recipe, model=model)


def run_stages(job: Job, last: int) -> None:
    """Stage 1 models, stage 2, evaluation, up to number `last` of `ALL_STAGES`."""
    stage2 = STAGE2[job.recipe.method]
    folders = stage1_folders(job.recipe, job.run)
    for stage in folders:
        job.session.stop.check()
        given = getattr(job.recipe.start, stage)
        if given is None and not job.run.stage_done(stage) and ALL_STAGES.index(stage) <= last:
            train_stage1(job, stage, folders)
    if last < ALL_STAGES.index(stage2) or (job.run.stage_done(stage2) and job.run.stage_done("evaluation")):
        return
    job.session.stop.check()
    model = HydraModel.from_stage1(
        job.table,
        folders,
        model=job.recipe.model,
        lora=job.recipe.lora,
        seed=job.recipe.seed,
        trust_remote_code=job.trust_remote_code,
        logit_tile_bytes=parse_bytes(job.recipe.memory.logit_tile),
    )
    chat, data = prepare_data(job, model)
    if not job.run.stage_done(stage2):
        job.sources.prepare()
        TRAIN[stage2](job, model, chat, data)
        save_policy(model, job.run.folder / stage2)
        job.run.finish_stage(stage2)
    if last >= ALL_STAGES.index("evaluation"):
        evaluate_run(job.session, job.run, model, chat, data, job.raw, reward_fn=job.sources)


def train_stage1(job: Job, stage: str, folders: dict[str, str]) -> None:
    """Train one stage-1 model and write it to the run folder."""
    recipe = job.recipe
    trunk = first_trunk(job, stage, folders)
    # A wrong target or rank is told before stage 1, not after it.
    check_rank(find_linears(trunk.decoder, recipe.lora.targets).values(), recipe.lora.rank)
    table = STAGE1_TABLES[stage]
    if stage == "sft" and recipe.start.sft_adapter is not None:
        load_peft_adapter(trunk, STAGE1_ADAPTER, Path(recipe.start.sft_adapter))
        trunk.adopt_adapter(STAGE1_ADAPTER)
        job.run.begin_stage(stage)
        save_stage1(job.run.folder / stage, trunk, job.tokenizer, None)
        job.run.finish_stage(stage)
        return
    name = next(iter(table.values())).trunk
    model = HydraModel(table, {name: trunk}, job.tokenizer, lora=recipe.lora, seed=recipe.seed)
    _, data = prepare_data(job, model)
    config: SupervisedConfig = getattr(recipe, stage)
    examples = stage1_examples(stage, data)
    train_supervised(
        job.session,
        model,
        examples,
        config,
        stage=stage,
        loss=stage1_loss(stage, recipe),
        lora=recipe.lora,
        seed=recipe.seed,
        held_out=data.test_pairs,
        limits=settle_supervised(recipe, model, stage, examples, job.run),
    )
    head = model.scalar_head(name, "reward") if "reward" in table else None
    save_stage1(job.run.folder / stage, model.trunk(name), job.tokenizer, head)
    job.run.finish_stage(stage)


def first_trunk(job: Job, stage: str, folders: dict[str, str]) -> Trunk:
    """What a stage-1 model starts from: the SFT model where there is one already, else the base."""
    model = job.recipe.model
    path = folders.get("sft", model.path) if stage != "sft" else model.path
    if path.startswith(SCRATCH):
        seed = seed_for(job.recipe.seed, "scratch") % 2**32
        return scratch_trunk(path.removeprefix(SCRATCH), job.tokenizer, model, seed=seed)
    return load_trunk(path, model, trust_remote_code=job.trust_remote_code)


def stage1_loss(stage: str, recipe: Recipe) -> Loss:
    """The loss of a stage-1 model."""
    losses: dict[str, Loss] = {
        "sft": sft.loss,
        "reward_model": reward_model.loss,
        "hydra_sft": hydra_sft.with_coef(recipe.hydra_sft.reward_loss_coef),
    }
    return losses[stage]


def stage1_examples(stage: str, data: Datasets) -> list[Example]:
    """Pairs where a reward head is trained, demonstrations where none is."""
    return list(data.train_pairs if "reward" in STAGE1_TABLES[stage] else data.demonstrations)


def prepare_data(job: Job, model: HydraModel) -> tuple[ChatFormat, Datasets]:
    """The chat format of a model's tokenizer, and every row as ids; writes data.json."""
    chat = chat_format(job.recipe.data, model.tokenizer, job.raw.train.prompts, eos_id=model.eos_id)
    data = tokenize(job.raw, chat)
    check_datasets(model, data, job.recipe.ppo.sampling.max_response_tokens)
    job.run.write_json("data.json", data.summary)
    job.run.write_json("chat.json", {"template": chat.template})
    return chat, data


def stage1_folders(recipe: Recipe, run: Run) -> dict[str, str]:
    """Where each stage-1 model of a recipe is or will be, in training order: {stage: given start, or run folder}.

    With an SFT start, that comes first and the rest starts from it.
    """
    return {stage: getattr(recipe.start, stage) or str(run.folder / stage) for stage in stage1_stages(recipe)}


def stage1_stages(recipe: Recipe) -> tuple[str, ...]:
    """The stage-1 models of a recipe in training order, given ones included."""
    needed = stage1_models(method_table(recipe))
    starts_from_sft = recipe.start.sft is not None or recipe.start.sft_adapter is not None
    return ("sft", *needed) if starts_from_sft and "sft" not in needed else needed


def check_start(recipe: Recipe) -> None:
    """Raise `ConfigError` for a start that the recipe's method has no use for, and for what its base cannot do."""
    start, needed = recipe.start, stage1_models(method_table(recipe))
    if start.sft is not None and start.sft_adapter is not None:
        raise ConfigError("start.sft and start.sft_adapter both name the SFT model; remove one of them")
    for stage in ("reward_model", "hydra_sft"):
        if getattr(start, stage) is not None and stage not in needed:
            raise ConfigError(
                f"start.{stage}={getattr(start, stage)!r} has no place in method={recipe.method}, which starts from "
                f"{' and '.join(needed)}; remove it or choose another method"
            )
    missing = [stage for stage in stage1_stages(recipe) if getattr(start, stage) is None]
    trained = [stage for stage in missing if stage != "sft" or start.sft_adapter is None]
    check_quantization(recipe, method_table(recipe), trained, loads_base=bool(missing) and start.sft is None)
    check_start_base(start, recipe.model.path, recipe.model.revision)
    check_packages(recipe, (*trained, STAGE2[recipe.method]))


def find_tokenizer(recipe: Recipe, run: Run, raw: RawData, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The model's tokenizer; a scratch model's is trained on the data once and kept in the run folder."""
    start = recipe.start
    path = start.hydra_sft or start.sft or recipe.model.path
    if not path.startswith(SCRATCH):
        return load_tokenizer(path, recipe.model, trust_remote_code=trust_remote_code)
    folder = run.folder / "tokenizer"
    if not (folder / "tokenizer.json").exists():
        draft = run.folder / "tokenizer-draft"  # renamed when whole, so that a killed run leaves no half of it
        scratch_tokenizer(raw.texts(), recipe.model.scratch_vocab_size).save_pretrained(draft)
        draft.rename(folder)
    return load_tokenizer(str(folder), recipe.model)


def settle_machine(run: Run) -> None:
    """Fix what changes summation order, once per run: a resumed run uses the thread count it began with."""
    machine = run.folder / "machine.json"
    if not machine.exists():
        run.write_json(machine.name, {"num_threads": run.recipe.runtime.num_threads or torch.get_num_threads()})
    torch.set_num_threads(run.read_json(machine.name)["num_threads"])
    ask_for_determinism(run.recipe.runtime.deterministic)
