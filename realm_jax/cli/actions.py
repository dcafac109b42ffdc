"""The functions that run the commands of `realm-jax`.

Each row of `commands.COMMANDS` names one; its keywords are the flags of the
row, and `options` pass through to the program. Each function imports its own
program, so that no command waits for the libraries of another.
"""

import contextlib
import dataclasses
import json as json_lib
import os
import pathlib
import shlex
import sys
from typing import TYPE_CHECKING, Any

from absl import app

from realm_jax.runtime import extension
from realm_jax.runtime import lines

if TYPE_CHECKING:
  from realm_jax.builder import documents
  from realm_jax.config import Config

_TERMINATED = 143  # Exit code of a job that SIGTERM stopped: 128 + SIGTERM.


def prepare(
    *,
    source: str | None,
    output: str,
    pretraining_source: str | None,
    exclude: list[str],
    beam: str | None,
    stats: bool,
    **options: Any,
) -> None:
  if not source and not stats:
    raise ValueError(
        'Give --source, the texts to prepare; without it, --stats describes the'
        ' corpus at --output.'
    )
  if source:
    from realm_jax.prepare import filters
    from realm_jax.prepare import prepare as prepare_lib

    manifest = prepare_lib.prepare(
        lines.comma_separated(source),
        output,
        pretraining_sources=lines.comma_separated(pretraining_source),
        exclude=filters.KINDS if exclude == ['all'] else exclude,
        beam=None if beam is None else shlex.split(beam),
        **options,
    )
    if not stats:
      print(_indented(manifest['counts']))
  if stats:
    from realm_jax.evaluation import corpus_stats

    figures = corpus_stats.describe(pathlib.Path(output))
    print(json_lib.dumps(figures, indent=2, ensure_ascii=False))


def tag(*, corpus: str, tagger: str, output: str, **options: bool) -> None:
  from realm_jax.corpus import corpus as corpus_lib
  from realm_jax.inference import tagging

  opened = corpus_lib.Corpus.open(corpus)
  manifest = tagging.tag_corpus(opened, tagger, output, **options)
  print(_indented(manifest['splits']))


def plan(
    *,
    config: 'Config | None',
    passages: int | None,
    mean_wordpieces: float | None,
    chip: str,
    peak_tflops: float | None,
    memory_gb: float | None,
    compile: bool,
    json: bool,
    **setting: Any,
) -> None:
  from realm_jax.planner import plan as plan_lib
  from realm_jax.trainer import job

  if chip == 'list':
    for name, one in plan_lib.CHIPS.items():
      print(
          f'{name:12}{one.tflops:6g} TFLOP/s {one.memory_gb:5g} GB'
          f' {one.memory_gb_per_second:6g} GB/s'
      )
    return
  if config is None:
    raise app.UsageError('--config is missing.')
  if chip not in plan_lib.CHIPS:
    raise ValueError(
        f'--chip={chip}: must be one of {", ".join(plan_lib.CHIPS)}; for'
        ' another chip, add --peak_tflops and --memory_gb to a similar one.'
    )
  device = plan_lib.CHIPS[chip]
  device = dataclasses.replace(
      device, tflops=peak_tflops or device.tflops,
      memory_gb=memory_gb or device.memory_gb,
  )
  corpus = config.corpus or '(none)'  # A plan does not need one.
  job.validate(dataclasses.replace(config, corpus=corpus))
  config, passages, mean_wordpieces, corpus_bytes = plan_lib.of_corpus(
      config, passages, mean_wordpieces
  )
  given = plan_lib.Setting(
      passages, mean_wordpieces, device, corpus_bytes, **setting
  )
  result = plan_lib.plan(config, given)
  if compile:
    result['compiled_here'] = plan_lib.compiled(config)
  print(_indented(result) if json else plan_lib.as_text(result))


def train(
    *,
    config: 'Config',
    workdir: str,
    profile: str | None,
    deterministic: bool,
    with_index_builder: bool,
    **processes: Any,
) -> None:
  from realm_jax.cli import flags
  from realm_jax.runtime import distributed
  from realm_jax.runtime import metrics as metrics_lib
  from realm_jax.trainer import loop
  from realm_jax.trainer import stages

  config.deterministic |= deterministic
  if config.deterministic:  # XLA reads it once; the index builder inherits it.
    flag = '--xla_gpu_deterministic_ops=true'
    os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {flag}'
  steps = metrics_lib.parse_steps(profile) if profile else None
  explicit = flags.overridden('config')
  summary = None
  with _processes(**processes):
    main = distributed.is_main()
    try:
      supervised = with_index_builder and stages.load(config).searches
      if supervised and main:
        from realm_jax.trainer import supervise

        with supervise.IndexBuilderProcess(
            workdir, max_failures=config.refresh.max_builder_failures
        ) as builder:
          summary = loop.train(
              config, workdir, health=builder.health, profile=steps,
              explicit=explicit,
          )
      else:
        summary = loop.train(config, workdir, profile=steps, explicit=explicit)
    except loop.Interrupted as error:  # In all processes.
      print(error, file=sys.stderr)
  if summary is None:
    sys.exit(_TERMINATED)
  if main:
    print(_indented(summary))


def index(
    *,
    workdir: str,
    corpus: str | None,
    follow: bool,
    step: int | None,
    start_timeout: float,
    parent_pid: int,
    **processes: Any,
) -> None:
  from realm_jax.builder import builder
  from realm_jax.runtime import distributed

  with _processes(**processes):
    if follow:
      builder.follow(
          workdir, start_timeout=start_timeout, parent_pid=parent_pid or None,
          corpus=corpus,
      )
    else:
      path = builder.build(workdir, step, corpus)
      if distributed.is_main():
        print(path)


def _processes(
    *, distributed: bool, coordinator_timeout: float, **explicit: Any
) -> contextlib.AbstractContextManager[None]:
  """Joins the other processes of a job that has several."""
  is_explicit = any(value is not None for value in explicit.values())
  if not distributed and not is_explicit:
    return contextlib.nullcontext()
  if distributed and is_explicit:
    raise ValueError(
        'Give either --distributed or --coordinator, --num_processes and'
        ' --process_id: --distributed detects these three.'
    )
  from realm_jax.runtime import distributed as distributed_lib

  return distributed_lib.job(**explicit, timeout=coordinator_timeout)


def verify(*, workdir: str, step: int | None, corpus: str | None) -> None:
  from realm_jax.builder import status

  bad = 0
  for found in status.verify(workdir, step, corpus):
    bad += bool(found.problems)
    verdict = f'{len(found.problems)} PROBLEM(S)' if found.problems else 'sound'
    print(': '.join(filter(None, [str(found.path), verdict, found.about])))
    for problem in found.problems:
      print('  ' + problem.replace('\n', '\n  '))
  if bad:
    sys.exit(1)


def info(*, workdir: str, json: bool) -> None:
  from realm_jax.builder import status

  found = status.info(workdir)
  print(_indented(found) if json else status.as_text(found))


def add(*, workdir: str, input: str, **options: Any) -> None:
  from realm_jax.builder import documents

  records = lines.comma_separated(input)
  _report(workdir, documents.add(workdir, records, **options))


def update(**options: Any) -> None:
  add(replace=True, **options)


def delete(*, workdir: str, input: str, **options: Any) -> None:
  from realm_jax.builder import documents

  _report(workdir, documents.delete(workdir, input, **options))


def compact(*, workdir: str, output: str | None, corpus: str | None) -> None:
  from realm_jax.builder import documents

  change = documents.compact(workdir, output, corpus=corpus)
  if change is None:
    print('There is nothing to compact.')
  else:
    _report(workdir, change)


def _report(workdir: str, change: 'documents.Change') -> None:
  if change.output:
    print(
        f'Wrote {change.output}: {change.live:,} passages (version'
        f' {change.version}) without the {change.removed:,} removed.'
    )
  else:
    print(
        f'Passages added: {change.added:,}, removed: {change.removed:,}; now'
        f' {change.live:,} can be found (version {change.version}).'
    )
  if change.missing:
    print(f'Unknown ids: {change.missing:,}.')
  if change.embedded:
    print(
        f'Passages embedded: {change.embedded:,} by the parameters of step'
        f' {change.step}, in {change.seconds:.1f} s with the start'
        f' ({change.embedded / change.seconds:,.1f}/s).'
    )
  if change.compact:
    print(
        'Many changes have accumulated and slow down search; run'
        f' `realm-jax index compact --workdir={workdir}`.'
    )


def evaluate(
    *,
    workdir: str,
    tagged: str | None,
    tag_column: str | None,
    tag_names: str | None,
    **options: Any,
) -> None:
  from realm_jax.evaluation import report

  if tagged:
    from realm_jax.inference import tagging

    names = None if tag_names is None else lines.comma_separated(tag_names)
    results = [tagging.evaluate(workdir, tagged, tag_column, names)]
    report.save(workdir, results[0])
  else:
    from realm_jax.evaluation import evaluate as evaluate_lib

    results = evaluate_lib.evaluate(workdir, **options)
  print(report.write(workdir, results))


def compare(*paths: str) -> None:
  if len(paths) != 2:
    raise app.UsageError(
        'Give two files evaluation/STEP.questions.jsonl, that of the run hoped'
        f' to be better first; got {len(paths)} arguments.'
    )
  from realm_jax.evaluation import runs

  print(runs.as_text(runs.compare(*paths)))


def doctor(*, workdir: str, json: bool) -> None:
  from realm_jax.evaluation import doctor as doctor_lib

  report = doctor_lib.examine(workdir)
  print(_indented(dataclasses.asdict(report)) if json else report.as_text())
  if report.findings:
    sys.exit(1)


def report(
    *, workdir: str, output: str, inspect: str | None, corpus: str | None
) -> None:
  from realm_jax.serving import report_page

  workdirs = lines.comma_separated(workdir)
  path = report_page.write(workdirs, output, inspect, corpus)
  print(f'Written to {path}.')


def inspect(
    *sentences: str,
    workdir: str,
    k: int | None,
    html: str | None,
    corpus: str | None,
) -> None:
  if len(sentences) != 1:
    raise app.UsageError(
        'Give one sentence with a [MASK] in it, in quotes; got'
        f' {len(sentences)} arguments.'
    )
  from realm_jax.evaluation import inspect as inspect_lib

  found = inspect_lib.inspect(workdir, sentences[0], k, corpus)
  print(inspect_lib.as_text(found))
  if html:
    from realm_jax.serving import report_page

    pathlib.Path(html).write_text(report_page.of_inspection(found), 'utf-8')
    print(f'Written to {html}.')


def import_(
    *, source: str, workdir: str, components: str | None, **options: Any
) -> None:
  from realm_jax.interop import importing

  names = lines.comma_separated(components) or None
  sources = lines.comma_separated(source)
  print(_indented(importing.run(sources, workdir, components=names, **options)))


def export(*, classes: str | None, **options: Any) -> None:
  from realm_jax.interop import export as export_lib

  names = lines.comma_separated(classes) or None
  print('\n'.join(map(str, export_lib.run(classes=names, **options))))


def questions(**options: Any) -> None:
  from realm_jax.qa import question_sets

  print(_indented(question_sets.convert(**options)))


def ask(
    *asked: str,
    workdir: str,
    k: int | None,
    step: int | None,
    json: bool,
    corpus: str | None,
) -> None:
  if len(asked) > 1:
    raise app.UsageError(
        f'Give one question, in quotes, or none; got {len(asked)}.'
    )
  from realm_jax.inference import answering

  loaded = answering.OpenQA.load(workdir, step, corpus)
  show = answering.as_json if json else answering.as_text
  if asked:
    print(show(loaded, loaded.answer(asked[0], k)))
    return
  terminal = sys.stdin.isatty()
  if terminal:
    print('A question in each line; an empty line ends.')
  while True:
    if terminal:
      print('> ', end='', flush=True)
    line = sys.stdin.readline().strip()
    if not line:
      return
    print(show(loaded, loaded.answer(line, k)), flush=True)


def serve(**options: Any) -> None:
  with extension.needed_by('Serving', 'serve'):
    from realm_jax.serving import server
  server.serve(**options)


def _indented(value: Any) -> str:
  return json_lib.dumps(value, indent=2)
