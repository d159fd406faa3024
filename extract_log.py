"""Stage 2/4. Reads a model and training text. Writes logs/<run>/: projected per-example gradients and their Hessian.

    python extract_log.py --lora random --hessian ekfac --mlp_only --data_name pydoc --data_config short

The slowest stage. On several GPUs: accelerate launch --num_processes 8 --num_machines 1 --multi_gpu extract_log.py ...
To resume after a stop, run the same command again, on any number of processes.
"""

import argparse
from pathlib import Path

from logra.runtime import flags, progress
from logra.runtime.settings import DataSettings, Execution, RunSettings


def build_parser() -> flags.Parser:
    """Return the parser of the command line."""
    parser = flags.Parser(description=__doc__)
    flags.add_run_flags(parser)
    flags.add_stage_2_flags(parser)
    return parser


if __name__ == "__main__":  # --help and wrong flags do not wait for the slow imports below
    PARSER = build_parser()
    ARGS = PARSER.parse_args()

from logra.models import model
from logra.run_dir import RunDir, RunRecord
from logra.runtime import processes
from logra.scoring import rerank
from logra.stages import calibrate, checkpoints, extract, open_run
from logra.stages.fine_run import FineRun, choose_rank
from logra.tools import estimate, trial, verify


def main(args: argparse.Namespace) -> None:
    """Write what the run still lacks; with --checkpoints, what the run of each checkpoint lacks."""
    if args.extend and not (args.log_dir and args.data_name and not args.overwrite):
        raise ValueError(
            "expected --extend with --log_dir and --data_name, and not --overwrite; give the run and the data"
        )
    run_flags, execution = flags.read_run_flags(args), flags.read_execution(args)
    processes.start()
    parent, members = checkpoints.find(run_flags, must_exist=args.extend)
    if args.verify or args.dry_run or args.trial:
        look_ahead(args, members, execution)
        return

    if parent:
        checkpoints.prepare(parent, members, execution)
        progress.keep_log(parent)
    tokens = 0
    for i, member in enumerate(members):
        if parent:
            progress.say(f"checkpoint {i + 1} of {len(members)}: {member.folder.name}")
        tokens += extract_run(args, member, checkpoints.sibling(parent, members, i), execution)
    progress.summary("compute_influence.py with the same flags", tokens)


def extract_run(
    args: argparse.Namespace, member: checkpoints.Member, sibling: RunDir | None, execution: Execution
) -> int:
    """Write what a run lacks: run.json, train/, projections, gradient shards, Hessian. Return its new tokens."""
    folder, run_flags = member
    with extract.locked(folder):
        # Find the run, or complete the settings of a new one
        run = open_run.find_run(folder, run_flags, must_exist=args.extend)
        if run:
            open_run.say_kept_settings(run, run_flags)
        settings = run.settings if run else open_run.new_settings(run_flags, execution, sibling)
        first_hessian = (run or sibling).first_hessian if run or sibling else args.hessian or "raw"
        kind = args.hessian or first_hessian
        settings.check_hessian(kind, first_hessian)
        run = processes.on_rank_0(extract.share_train)(run, sibling) if args.extend and sibling else run
        further = run_flags.documents if args.extend and not extract.has_documents(run, run_flags.documents) else None
        if run:
            extract.check_data_files(run)
            open_run.check_model_files(run)

        # Write examples, projections and gradients, unless all shards exist and are whole
        pending = extract.unfinished_shards(run) if run and not further else None
        tokens, lm = 0, None
        if pending != []:
            lm, run = set_up(args, folder, settings, run, further, execution, sibling)
            if processes.state().is_main_process:
                extract.check_disk(run)
                extract.check_hessian_memory(run, kind)
            pending = extract.unfinished_shards(run) if pending is None else pending
            tokens = extract.write_shards(lm, run, pending, execution)

        # Write the Hessian, and with --rerank_rank the statistics of re-ranking
        progress.keep_log(folder)
        view = FineRun(run, choose_rank(run.shapes, args.rerank_rank)) if args.rerank_rank else None
        if view and processes.on_rank_0(view.problem)():
            checkpoints.with_statistics(view, lm, execution)
        del lm
        extract.write_hessian(kind, run)
    extract.say_finished(run, kind)
    return tokens


def set_up(
    args: argparse.Namespace, folder: Path, settings: RunSettings, run: RunDir | None, further: DataSettings | None,
    execution: Execution, sibling: RunDir | None,
) -> tuple[model.nn.Module, RunDir]:  # fmt: skip
    """Load the model, and write what is missing of run.json, train/ (or an extension) and projections.safetensors."""
    lm, tokenizer, described = open_run.load_model(settings, execution)
    open_run.say_tracked(lm, described, settings)
    if run:
        run.check_model(described)
    if sibling:
        checkpoints.check_model(sibling, settings.model_name, described)
    if processes.state().is_main_process and (further or not run):
        if not run:
            model_files = model.source_contents(settings.model_name)
            arguments = vars(args) | ({"hessian": sibling.first_hessian} if sibling else {})
            run = RunDir(folder, RunRecord(settings, arguments, **described, model_files=model_files))
        if sibling and not run.parts:
            extract.share_train(run, sibling)
        else:
            extract.write_train(run, tokenizer, further, args.cache_dir, args.num_proc)
    run = open_run.reload(folder)
    run.check_model(described)  # each rank has loaded a model of its own
    if run.record.projections is None:
        calibrate.make_projections(lm, run, execution)
        run = open_run.reload(folder)
    return lm, run


def look_ahead(args: argparse.Namespace, members: list[checkpoints.Member], execution: Execution) -> None:
    """Check (--verify) or predict (--dry_run, --trial) the run, or those of all checkpoints."""
    settings, kind = open_run.new_settings(members[0].flags, execution), args.hessian or "raw"
    if args.verify:
        again = (args.rerank_rank, rerank.rerank) if args.rerank_rank else None
        every = [member.settings(settings) for member in members]
        verify.verify(every, kind, execution, args.verify, args.cache_dir, again)
        return
    wanted = (args.cache_dir, len(members), args.rerank_rank)
    run, size, sample = estimate.estimate(settings, members[0].folder, kind, execution, *wanted)
    if args.trial:
        trial.say_hours(run, size.tokens, size.seconds, sample, kind, execution, args.trial, len(members))


if __name__ == "__main__":
    flags.run_script(main, PARSER, ARGS)
