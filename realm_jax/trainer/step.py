"""The training step of each objective: pure functions of state and batch.

For REALM, the loop embeds the masked sentences and searches. The step scores
the candidates with the current parameters, reads them, marginalises, and
updates reader and retriever.
"""

from collections.abc import Callable
import dataclasses
from typing import Any
import zlib

import jax
import jax.numpy as jnp
import optax

from realm_jax import config as config_lib
from realm_jax.models import components as components_lib
from realm_jax.models import dropout
from realm_jax.models import embedder as embedder_lib
from realm_jax.models import objectives
from realm_jax.models import realm
from realm_jax.models import span_reader
from realm_jax.models import tagger
from realm_jax.runtime import mesh as mesh_lib
from realm_jax.trainer import gradients
from realm_jax.trainer import optimizer

Components = dict[str, components_lib.Component]
LossAndMetrics = gradients.LossAndMetrics
Metrics = gradients.Metrics
# What a step of an objective reads; see `input_names`.
INPUTS = {
    'mlm': 'joint_ids_BT joint_types_BT positions_BM targets_BM mask_BM',
    'ict': 'query_ids_BQ doc_ids_BS doc_types_BS passage_B',
    'realm': (
        'query_ids_BQ doc_ids_BJS doc_types_BJS joint_ids_BKT joint_types_BKT'
        ' positions_BM targets_BM mask_BM'
    ),
    'open_qa': (
        'query_ids_BQ doc_emb_BNE has_answer_BN joint_ids_BKT joint_types_BKT'
        ' body_BK2 correct_BKP'
    ),
    'tagger': 'ids_BL types_BL labels_BL',
}
_DOCUMENTS = ' doc_ids_BKS doc_types_BKS'  # Of open_qa, where they learn.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """All that a step changes; with the data iterator, all there is to resume."""

  step: jax.Array  # int32, updates done.
  params: dict[str, components_lib.Params]
  opt_state: Any
  rng: jax.Array  # Root key of the run; never changes.


def input_names(config: config_lib.Config) -> list[str]:
  """Which arrays of a batch a step reads; the rest stays on the host."""
  names = INPUTS[config.objective]
  if config.objective == 'open_qa' and config.open_qa.documents == 'trained':
    names += _DOCUMENTS
  return names.split()


def abstract_state(
    components: Components, tx: optax.GradientTransformation
) -> TrainState:
  """Returns the shapes and types of a job's state."""
  params = {name: c.abstract for name, c in components.items()}
  return TrainState(
      step=jax.ShapeDtypeStruct((), jnp.int32),
      params=params,
      opt_state=jax.eval_shape(tx.init, params),
      rng=jax.eval_shape(lambda: jax.random.key(0)),
  )


def state_shardings(
    config: config_lib.Config,
    components: Components,
    tx: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
) -> TrainState:
  """Returns the sharding of every array of the state, in its structure."""
  return mesh_lib.shardings(
      abstract_state(components, tx), mesh, config.mesh.zero
  )


def objective_of(
    config: config_lib.Config,
    components: Components,
    null_ids: tuple[int, int, int],
) -> gradients.Objective:
  """Returns what a step of the config's objective minimises."""

  def read_alone(
      params: Any, batch: Any, noise: dropout.Noise | None
  ) -> jax.Array:
    return components['reader'].apply(
        params['reader'],
        'token_logp',
        batch['joint_ids_BT'],
        batch['joint_types_BT'],
        batch['positions_BM'],
        batch['targets_BM'],
        noise,
    )

  def mlm_loss(
      token_logp_BM: jax.Array, batch: Any, axis: str | None
  ) -> LossAndMetrics:
    del axis  # A row's loss is its own.
    loss, _ = objectives.masked_mlm(token_logp_BM, batch['mask_BM'])
    return loss, {}

  def embed_pairs(
      params: Any, batch: Any, noise: dropout.Noise | None
  ) -> Any:
    embedder = components['embedder']
    query_emb_BE = embedder.apply(
        params['embedder'], 'embed_query', batch['query_ids_BQ'], noise
    )
    doc_emb_BE = embedder.apply(
        params['embedder'],
        'embed_document',
        batch['doc_ids_BS'],
        batch['doc_types_BS'],
    )
    return query_emb_BE, doc_emb_BE

  def ict_loss(outputs: Any, batch: Any, axis: str | None) -> LossAndMetrics:
    query_emb_BE, doc_emb_CE = outputs
    passage_B = passage_C = batch['passage_B']
    first = 0
    if axis is not None:
      first = jax.lax.axis_index(axis) * len(query_emb_BE)
      doc_emb_CE, passage_C = jax.lax.all_gather(
          (doc_emb_CE, passage_C), axis, tiled=True
      )
    return objectives.in_batch_softmax(
        query_emb_BE, doc_emb_CE, first, passage_B[:, None] == passage_C
    )

  def score_and_read(
      params: Any, batch: Any, noise: dropout.Noise | None
  ) -> Any:
    score_BK = realm.candidate_scores(
        components['embedder'],
        params['embedder'],
        batch['query_ids_BQ'],
        batch['doc_ids_BJS'],
        batch['doc_types_BJS'],
        null_ids if config.null_document else None,
        None if noise is None else noise.fold(0),
    )
    token_logp_BKM = realm.read_targets(
        components['reader'],
        params['reader'],
        batch['joint_ids_BKT'],
        batch['joint_types_BKT'],
        batch['positions_BM'],
        batch['targets_BM'],
        None if noise is None else noise.fold(1),
    )
    return score_BK, token_logp_BKM

  def marginal_loss(
      outputs: Any, batch: Any, axis: str | None
  ) -> LossAndMetrics:
    del axis  # A row's loss is its own.
    mask_BM = batch['mask_BM']
    score_BK, token_logp_BKM = outputs
    loss, aux = objectives.marginal_mlm(
        score_BK, token_logp_BKM, mask_BM, config.granularity
    )
    return loss, objectives.retrieval_metrics(aux, mask_BM.any(-1))

  def retrieve_and_read(
      params: Any, batch: Any, noise: dropout.Noise | None
  ) -> Any:
    embedder, reader = components['embedder'], components['span_reader']
    query_emb_BE = embedder.apply(
        params['embedder'],
        'embed_query',
        batch['query_ids_BQ'],
        None if noise is None else noise.fold(0),
    )
    score_BN = embedder_lib.score(query_emb_BE, batch['doc_emb_BNE'])
    b, k, t = batch['joint_ids_BKT'].shape
    if config.open_qa.documents == 'trained':
      emb = embedder.apply(
          params['embedder'],
          'embed_document',
          batch['doc_ids_BKS'].reshape(b * k, -1),
          batch['doc_types_BKS'].reshape(b * k, -1),
      )
      fresh_BK = embedder_lib.score(query_emb_BE, emb.reshape(b, k, -1))
      score_BN = jnp.concatenate([fresh_BK, score_BN[:, k:]], axis=1)
    logits = reader.apply(  # (B*K) P
        params['span_reader'],
        'span_logits',
        batch['joint_ids_BKT'].reshape(b * k, t),
        batch['joint_types_BKT'].reshape(b * k, t),
        span_reader.inside(batch['body_BK2'], t).reshape(b * k, t),
        None if noise is None else noise.fold(1).repeat(k),
    )
    return logits.reshape(b, k, -1), score_BN

  def answer_loss(outputs: Any, batch: Any, axis: str | None) -> LossAndMetrics:
    del axis  # A row's loss is its own.
    logits_BKP, score_BN = outputs
    return span_reader.span_losses(
        logits_BKP,
        score_BN,
        batch['correct_BKP'],
        batch['has_answer_BN'],
        config.open_qa.normalization,
    )

  def tag(
      params: Any, batch: Any, noise: dropout.Noise | None
  ) -> jax.Array:
    return components['tagger'].apply(
        params['tagger'],
        'label_logits',
        batch['ids_BL'],
        batch['types_BL'],
        noise,
    )

  def tag_loss(
      logits_BLC: jax.Array, batch: Any, axis: str | None
  ) -> LossAndMetrics:
    del axis  # A row's loss is its own.
    loss, accuracy = tagger.tagging_loss(logits_BLC, batch['labels_BL'])
    return loss, {'accuracy': accuracy}

  def labelled(batch: Any) -> tuple[jax.Array, jax.Array]:
    return ((batch['labels_BL'] >= 0).sum(),) * 2

  def rows(batch: Any) -> tuple[jax.Array, jax.Array]:
    count = jnp.float32(len(batch['query_ids_BQ']))
    return count, count

  def masks(batch: Any) -> tuple[jax.Array, jax.Array]:
    return batch['mask_BM'].sum(), batch['mask_BM'].any(-1).sum()

  def masked_rows(batch: Any) -> tuple[jax.Array, jax.Array]:
    return (batch['mask_BM'].any(-1).sum(),) * 2

  match config.objective:
    case 'mlm':
      return gradients.Objective(read_alone, mlm_loss, masks)
    case 'ict':
      return gradients.Objective(embed_pairs, ict_loss, rows, in_batch=True)
    case 'realm':
      spans = config.granularity == 'span'
      return gradients.Objective(
          score_and_read, marginal_loss, masked_rows if spans else masks
      )
    case 'open_qa':
      return gradients.Objective(retrieve_and_read, answer_loss, rows)
    case 'tagger':
      return gradients.Objective(tag, tag_loss, labelled)
  raise ValueError(f'config.objective={config.objective!r} is not known.')


def loss_function(
    config: config_lib.Config,
    components: Components,
    null_ids: tuple[int, int, int],
) -> Callable[..., LossAndMetrics]:
  """Returns loss(params, batch, key) -> (loss, metrics), on one device.

  The key is for dropout; None for none.
  """
  objective = objective_of(config, components, null_ids)

  def loss(params: Any, batch: Any, key: jax.Array | None) -> LossAndMetrics:
    rows = len(next(iter(batch.values())))
    noise = None if key is None else dropout.noise(key, rows)
    outputs = objective.encode(params, batch, noise)
    return objective.loss(outputs, batch, None)

  return loss


def make_train_step(
    config: config_lib.Config,
    components: Components,
    tx: optax.GradientTransformationExtraArgs,
    null_ids: tuple[int, int, int],
    mesh: jax.sharding.Mesh,
    on_trace: Callable[[], None] = lambda: None,
) -> jax.stages.Wrapped:
  """Returns the jitted step(state, batch) -> (state, metrics).

  It takes over (donates) the state, which lies as `state_shardings` has it.

  `on_trace` is called each time the step is traced, that is, compiled.
  """
  shardings = state_shardings(config, components, tx, mesh)
  find_gradients = gradients.make_gradients(
      objective_of(config, components, null_ids),
      jax.tree.map(lambda x: x.spec, shardings.params),
      mesh,
      config.accumulate,
      config.optimizer.frozen,
  )

  def train_step(
      state: TrainState, batch: Any
  ) -> tuple[TrainState, Metrics]:
    on_trace()
    key = jax.random.fold_in(stream(state.rng, 'dropout'), state.step)
    (loss, metrics), grads = find_gradients(
        state.params, batch, dropout.noise(key, config.batch_size)
    )
    norm = optax.tree.norm(grads)
    for name in config.optimizer.frozen:
      grads[name] = jax.tree.map(jnp.zeros_like, state.params[name])
    updates, opt_state = tx.update(
        grads, state.opt_state, state.params, step=state.step
    )
    if config.objective == 'open_qa' and not config.open_qa.update_unanswered:
      # Nothing was learned from: neither weight decay nor old momentum. The
      # learning rate stays that of the step.
      learned = (metrics['retrieved'] > 0) | (metrics['readable'] > 0)
      updates = jax.tree.map(lambda x: jnp.where(learned, x, 0), updates)
      opt_state = jax.tree.map(
          lambda new, old: (
              new if _is_schedule(new) else jnp.where(learned, new, old)
          ),
          opt_state,
          state.opt_state,
          is_leaf=_is_schedule,
      )
    params = optax.apply_updates(state.params, updates)
    metrics = {
        'loss': loss,
        **metrics,
        'grad_norm': norm,
        'update_norm': optax.tree.norm(updates),
        'param_norm': optax.tree.norm(params),
    }
    for name in components:
      metrics[f'learning_rate_{name}'] = jnp.asarray(
          optimizer.learning_rate(config, name)(state.step), jnp.float32
      )
    state = TrainState(
        step=state.step + 1, params=params, opt_state=opt_state, rng=state.rng
    )
    return state, metrics

  return jax.jit(
      train_step,
      donate_argnums=0,
      in_shardings=(shardings, mesh_lib.over_batch(mesh)),
      out_shardings=(shardings, mesh_lib.replicated(mesh)),
  )


def _is_schedule(x: Any) -> bool:
  return isinstance(x, optax.ScaleByScheduleState)


def stream(root: jax.Array, name: str) -> jax.Array:
  """A named random stream: independent of how many others there are."""
  return jax.random.fold_in(root, zlib.crc32(name.encode()))
