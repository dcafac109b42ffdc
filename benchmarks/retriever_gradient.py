"""Which passages a step makes more likely: section 3.3 of the paper, measured.

  python benchmarks/retriever_gradient.py --workdir=runs/quickstart/realm \
      --steps=600 --output=benchmarks/results/retriever_gradient.json

The gradient of the loss with respect to the score of a passage is minus

    r(z) = p(z|x) [ p(y|z,x) / p(y|x) - 1 ]

so a step should raise f(x,z) in proportion to r(z) (Guu et al. 2020). But
scores are not free: a step moves the embedder, which all passages and queries
share. At checkpoints of a REALM run, on the next batches of its own data, r(z)
is compared with the measured change of f(x,z): after plain gradient descent
on one sentence, the same on a whole batch, and the job's own training step
(AdamW with the moments it had, retriever and reader).
"""

import pathlib
import shutil
import tempfile
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import stats

from realm_jax import config as config_lib
from realm_jax.inference import trained as trained_lib
from realm_jax.models import components as components_lib
from realm_jax.models import objectives
from realm_jax.runtime import checkpoint
from realm_jax.trainer import examples
from realm_jax.trainer import job as job_lib
from realm_jax.trainer import optimizer
from realm_jax.trainer import step as step_lib
from realm_jax.trainer.stages import realm

_UPDATES = {
    'sentence': 'gradient descent on one sentence',
    'batch': 'gradient descent on a batch',
    'training': 'the training step: AdamW, reader too',
}
_LARGEST_CHANGE = 0.01  # Change of a score by gradient descent, to first order.
_TRIAL = 1e-3  # Length of the step that shows how far to go.


class _Measurement:
  """A checkpoint of a run, with the next batches of its data."""

  def __init__(self, workdir: pathlib.Path, step: int):
    self._trained = trained_lib.Trained.open(workdir)
    self._config = self._trained.config
    self._workdir, self._step = workdir, step
    self._params = self._trained.load(step)
    self._search = self._trained.index(self._params, step).search
    self._stage = stage = realm.Realm(self._config, self._trained.corpus)

    def outputs(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
      models = components_lib.bind(self._trained.components, params)
      return stage.outputs(models, batch, None)

    def scores(params: Any, batch: Any) -> jax.Array:
      return outputs(params, batch)[0]

    def credit(params: Any, batch: Any) -> jax.Array:
      _, aux = objectives.marginal_mlm(*outputs(params, batch), batch.mask_BM)
      # p(z|x) p(y|z,x) / p(y|x) is p(z|x,y).
      return aux['posterior_BK'] - jnp.exp(aux['retriever_logp_BK'])

    def descend(params: Any, batch: Any) -> jax.Array:
      """The change of the scores by a small step of the embedder alone."""

      def of_embedder(embedder: Any) -> jax.Array:
        found = outputs({**params, 'embedder': embedder}, batch)
        return stage.loss(found, batch)[0]

      grads = jax.grad(of_embedder)(params['embedder'])

      def moved(rate: jax.Array) -> jax.Array:
        embedder = jax.tree.map(
            lambda p, g: p - rate * g, params['embedder'], grads
        )
        return scores({**params, 'embedder': embedder}, batch)

      before_BK = moved(jnp.zeros(()))
      norm = jnp.maximum(optax.tree.norm(grads), 1e-9)
      trial = _TRIAL / norm
      largest = jnp.abs(moved(trial) - before_BK).max()
      rate = trial * _LARGEST_CHANGE / jnp.maximum(largest, 1e-9)
      # A loss without a gradient gives no rate: the trial bounds it.
      return moved(jnp.minimum(rate, 10 * trial)) - before_BK

    self._scores, self._credit = jax.jit(scores), jax.jit(credit)
    self._descend = jax.jit(descend)

  def batches(self, count: int) -> list[realm.Batch]:
    """Returns the next batches of the run, with candidates."""
    trained, config = self._trained, self._config
    stream = examples.training_batches(self._stage, self._step)
    found = []
    for _ in range(count):
      queries = next(stream).inputs
      retrieved_BJ = self._search.search(
          trained.embed_queries(self._params, queries.query_ids_BQ),
          config.num_candidates - 1,
          queries.exclude_BR2,
      )
      found.append(
          realm.with_candidates(
              queries, retrieved_BJ, trained.corpus, trained.template
          )
      )
    return found

  def credits(self, batch: realm.Batch) -> np.ndarray:
    """r(z) of each candidate, [B, K]."""
    return np.asarray(self._credit(self._params, batch))

  def after_batch(self, batch: realm.Batch) -> np.ndarray:
    """Changes of the scores after one step on a batch, [B, K]."""
    return np.asarray(self._descend(self._params, batch))

  def after_training(self, batches: list[realm.Batch]) -> list[np.ndarray]:
    """The same after the job's training step, for each batch, [B, K]."""
    changes = []
    with tempfile.TemporaryDirectory() as folder:
      copy = pathlib.Path(folder)
      shutil.copy(self._workdir / 'config.json', copy)
      shutil.copytree(
          self._workdir / 'checkpoints' / str(self._step),
          copy / 'checkpoints' / str(self._step),
      )
      job = job_lib.open_job(config_lib.read(copy), copy)
      tx = optimizer.make_optimizer(job.config, tuple(job.components))
      train_step = step_lib.make_train_step(
          job.stage, job.components, tx, job.mesh
      )
      rates = optimizer.learning_rates(job.config, job.components, self._step)
      checkpoints = checkpoint.Checkpoints(copy, keep=0)
      for batch in batches:
        # A step donates its state.
        state, _ = job_lib.start_or_resume(job, checkpoints, tx)
        before = np.asarray(self._scores(state.params, batch))
        state, _ = train_step(state, batch, rates)
        after = np.asarray(self._scores(state.params, batch))
        changes.append(after - before)
      checkpoints.close()
    return changes


def measure(
    workdir: pathlib.Path, step: int, count: int
) -> tuple[dict[str, Any], dict[str, tuple[np.ndarray, np.ndarray]]]:
  """Returns flat figures of a checkpoint, and the points (r, change)."""
  measurement = _Measurement(workdir, step)
  batches = measurement.batches(count)
  credit_BK = np.concatenate([measurement.credits(b) for b in batches])
  sentences = [
      jax.tree.map(lambda x, i=i: x[i : i + 1], batch)
      for batch in batches
      for i in range(len(batch.mask_BM))
  ]
  changes = {
      'sentence': [measurement.after_batch(one) for one in sentences],
      'batch': [measurement.after_batch(b) for b in batches],
      'training': measurement.after_training(batches),
  }
  figures: dict[str, Any] = {'sentences': len(credit_BK)}
  points = {}
  for name, parts in changes.items():
    change_BK = np.concatenate(parts)
    # The null document is left out: its score moves with all queries at once.
    # Softmax is invariant to the mean.
    change_BJ = change_BK[:, 1:]
    change_BJ = change_BJ - change_BJ.mean(axis=1, keepdims=True)
    r_BJ = credit_BK[:, 1:]
    r, change = r_BJ.ravel(), change_BJ.ravel()
    points[name] = r, change
    # Is the sign right where r is not negligible?
    clear_BJ = np.abs(r_BJ) > 0.01
    clear, some_B = clear_BJ.ravel(), clear_BJ.any(axis=1)
    # The size of the changes differs from sentence to sentence.
    within_B = np.nan_to_num(
        stats.pearsonr(r_BJ[some_B], change_BJ[some_B], axis=1).statistic
    )
    figures |= {
        f'{name}_within_sentences_mean': float(within_B.mean()),
        f'{name}_within_sentences_median': float(np.median(within_B)),
        f'{name}_pearson': float(stats.pearsonr(r, change).statistic),
        f'{name}_spearman': float(stats.spearmanr(r, change).statistic),
        f'{name}_same_sign': float(
            (np.sign(r) == np.sign(change))[clear].mean()
        ),
        f'{name}_clear': int(clear.sum()),
    }
  return {f'step{step}_{k}': v for k, v in figures.items()}, points


def main() -> None:
  parser = harness.parser(__doc__, 'workdir')
  parser.add_argument('--steps', required=True, help='comma-separated')
  parser.add_argument('--batches', type=int, default=16)
  arguments = parser.parse_args()
  steps = [int(step) for step in arguments.steps.split(',')]
  figures: dict[str, Any] = {}
  figure, axes = harness.panels(len(_UPDATES), 3.6, len(steps))
  axes = iter(axes)
  for step in steps:
    found, points = measure(
        arguments.workdir, step, 2 if arguments.small else arguments.batches
    )
    figures |= found
    for name, (r, change) in points.items():
      axis = next(axes)
      axis.scatter(r, change, s=4, alpha=0.4)
      pooled = found[f'step{step}_{name}_pearson']
      within = found[f'step{step}_{name}_within_sentences_median']
      axis.set(
          title=f'step {step}: {_UPDATES[name]}\ncorrelation'
          f' {pooled:.2f}, within a sentence {within:.2f} (median)',
          xlabel='r(z)',
          ylabel='change of f(x,z) relative to the other candidates',
      )
      axis.title.set_fontsize(9)
  harness.write(arguments.output, figures, 'jax', 'flax')
  harness.save(figure, arguments.output)


if __name__ == '__main__':
  main()
