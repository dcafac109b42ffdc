"""Load and faults of `realm-jax serve` on the workdirs of the quickstart.

  make quickstart
  python benchmarks/serving.py [--output=FILE.json] [--small]
      [--folder=runs/quickstart]

Two cores are given to the server; the clients run on the same machine. First
one client asks the workdir `open_qa`, after a fresh start. Then 32 clients fill
in and search a copy of the workdir `realm`, which is served with --follow,
while in turn an index builder is killed (SIGKILL), a generation is published,
and a damaged one appears. Every answer of a search is compared with that of
`Retriever` for the generation that it names.
"""

import asyncio
import collections
import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import tempfile
import time

import harness
import httpx
import numpy as np

import realm_jax

_OLD, _NEW, _DAMAGED = 550, 575, 600  # Generations of the workdir `realm`.


class Server:
  """A server process on two cores."""

  def __init__(self, workdir: pathlib.Path, *flags: str):
    command = harness.command(
        'serve', f'--workdir={workdir}', '--port=0', *flags
    )
    command = harness.on_cores(sorted(os.sched_getaffinity(0))[:2], command)
    self.start = time.perf_counter()
    self.process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True
    )
    assert self.process.stdout is not None
    line = self.process.stdout.readline()
    found = re.search(r'http://\S+', line)
    assert found, line
    self.address = found[0]

  def close(self) -> None:
    self.process.terminate()
    self.process.wait(60)

  def cpu_seconds(self) -> float:
    fields = pathlib.Path(f'/proc/{self.process.pid}/stat').read_text().split()
    return (int(fields[13]) + int(fields[14])) / os.sysconf('SC_CLK_TCK')


def one_client(
    workdir: pathlib.Path, questions: list[str]
) -> harness.Figures:
  with (
      contextlib.closing(Server(workdir)) as server,
      httpx.Client(timeout=120) as client,
  ):

    def ask(question: str) -> float:
      start = time.perf_counter()
      answer = client.post(f'{server.address}ask', json={'question': question})
      answer.raise_for_status()
      return time.perf_counter() - start

    ask(questions[0])
    first, cpu = time.perf_counter() - server.start, server.cpu_seconds()
    time.sleep(30)  # Larger batches are compiled meanwhile.
    seconds = [ask(question) for question in questions]
  return {
      'first_answer_seconds': first,
      'first_answer_cpu_seconds': cpu,
      'one_client_p50_ms': 1e3 * float(np.percentile(seconds, 50)),
      'one_client_p99_ms': 1e3 * float(np.percentile(seconds, 99)),
  }


async def load(
    server: Server,
    workdir: pathlib.Path,
    aside: pathlib.Path,
    queries: list[str],
    seconds: float,
) -> tuple[harness.Figures, list[tuple[str, int, list[str]]]]:
  """Returns figures, and (query, generation, ids) of each search."""
  statuses: collections.Counter[int] = collections.Counter()
  times: list[float] = []
  searches: list[tuple[str, int, list[str]]] = []
  memory: list[float] = []
  end = time.perf_counter() + seconds

  async def client(number: int, http: httpx.AsyncClient) -> None:
    turn = number
    while time.perf_counter() < end:
      turn += 1
      query = queries[turn % len(queries)]
      path, body = 'search', {'query': query, 'k': 10}
      if turn % 2:
        path, body = 'fill', {'sentence': f'{query} [MASK].'}
      start = time.perf_counter()
      answer = await http.post(f'{server.address}{path}', json=body)
      statuses[answer.status_code] += 1
      if answer.status_code == 503:
        await asyncio.sleep(float(answer.headers['retry-after']))
        continue
      times.append(time.perf_counter() - start)
      if answer.status_code == 200 and path == 'search':
        found = answer.json()
        ids = [one['id'] for one in found['results']]
        searches.append((query, found['source']['index_generation'], ids))

  async def faults() -> None:
    builder = await asyncio.create_subprocess_exec(
        *harness.command('index', f'--workdir={workdir}', f'--step={_DAMAGED}'),
        stderr=subprocess.DEVNULL,
    )
    index = workdir / 'index'
    while not list(index.glob('.building-*')) and builder.returncode is None:
      await asyncio.sleep(0.05)
    builder.send_signal(signal.SIGKILL)
    await builder.wait()
    await asyncio.sleep(max(0.0, end - time.perf_counter() - 0.6 * seconds))
    (aside / str(_NEW)).rename(index / str(_NEW))
    await asyncio.sleep(0.3 * seconds)
    (aside / str(_DAMAGED)).rename(index / str(_DAMAGED))

  async def watch() -> None:
    while time.perf_counter() < end:
      memory.append(harness.resident_mib(server.process.pid))
      await asyncio.sleep(1)

  limits = httpx.Limits(max_connections=64)
  async with httpx.AsyncClient(timeout=120, limits=limits) as http:
    clients = [client(number, http) for number in range(32)]
    await asyncio.gather(*clients, faults(), watch())
    about = (await http.get(f'{server.address}about')).json()
  third = max(len(memory) // 3, 1)
  figures = {
      'statuses': {str(k): v for k, v in sorted(statuses.items())},
      'requests_per_second': len(times) / seconds,
      'p50_ms': 1e3 * float(np.percentile(times, 50)),
      'p99_ms': 1e3 * float(np.percentile(times, 99)),
      'memory_mb_thirds': [
          float(np.median(memory[i * third : (i + 1) * third]))
          for i in range(3)
      ],
      'generation_at_the_end': about['index_generation'],
      'damaged_is_refused': f'{_DAMAGED} is damaged' in str(about['refused']),
  }
  return figures, searches


def main() -> None:
  parser = harness.parser(__doc__, output=False, folder='runs/quickstart')
  arguments = parser.parse_args()
  folder, seconds = arguments.folder, 20.0 if arguments.small else 60.0
  with open(folder / 'corpus' / 'questions.jsonl', encoding='utf-8') as file:
    questions = [json.loads(line)['question'] for line in file][:200]
  with tempfile.TemporaryDirectory() as temporary:
    workdir, aside = pathlib.Path(temporary, 'realm'), pathlib.Path(temporary)
    shutil.copytree(folder / 'realm', workdir)
    for step in (_NEW, _DAMAGED):
      (workdir / 'index' / str(step)).rename(aside / str(step))
    shard = max(aside.glob(f'{_DAMAGED}/*.npy'))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    figures = one_client(folder / 'open_qa', questions)
    with contextlib.closing(Server(workdir, '--follow')) as server:
      queries = [' '.join(one.rstrip('?').split()[-4:]) for one in questions]
      found, searches = asyncio.run(
          load(server, workdir, aside, queries, seconds)
      )
    wrong = 0
    for step in sorted({generation for _, generation, _ in searches}):
      retriever = realm_jax.Retriever.load(workdir, step)
      mine = [one for one in searches if one[1] == step]
      hits = retriever.search(queries, 10)
      for query, _, ids in mine:
        rows = hits.rows[queries.index(query)]
        wrong += ids != [retriever.passage(row)['id'] for row in rows]
  figures |= found
  figures['searches_checked'], figures['searches_wrong'] = len(searches), wrong
  # Above 2, other processes wait for the cores, too.
  figures['load_average_5_minutes'] = os.getloadavg()[1]
  harness.write(arguments.output, figures, 'jax', 'fastapi', 'uvicorn')


if __name__ == '__main__':
  main()
