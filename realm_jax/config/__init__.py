"""The configuration of every job: one typed tree, its JSON and its identity.

`experiments/*.py` return a `Config` in which only what differs from the
defaults is set; `--config.section.field=value` overrides both. The defaults are
the paper's (Guu et al. 2020, section 4 and appendix A), except for `refresh`.
"""

import copy
import dataclasses
from typing import Any, Literal

# Search backends and their classes; see index/search.py.
BACKENDS = {
    'exact': 'realm_jax.index.search:ExactSearch',
    'approx': 'realm_jax.index.search:ApproxSearch',
    'scann': 'realm_jax.index.scann:ScannSearch',
}
# Layers, width and heads of the published small BERTs (Turc et al. 2019) and of
# BERT-base.
PRESETS = {
    'tiny': (2, 128, 2),
    'mini': (4, 256, 4),
    'small': (4, 512, 8),
    'base': (12, 768, 12),
}


@dataclasses.dataclass(frozen=True)
class Encoder:
  """An encoder and the defaults of `ModelConfig` that are its own.

  path: of its class, a subclass of `realm_jax.models.encoders.Encoder`.
  base: layers, width and heads of the preset 'base'.
  mlp_ratio: width of the MLP / width of the encoder.
  """

  path: str
  base: tuple[int, int, int] = PRESETS['base']
  mlp_ratio: float = 4.0
  activation: Literal['gelu', 'gelu_new'] = 'gelu'
  layer_norm_eps: float = 1e-5


ENCODERS = {
    'bert': Encoder(
        'realm_jax.models.bert:Bert', activation='gelu_new',
        layer_norm_eps=1e-12,
    ),
    'roberta': Encoder('realm_jax.models.bert:Roberta'),
    'modernbert': Encoder(
        'realm_jax.models.modernbert:ModernBert', (22, 768, 12), mlp_ratio=1.5
    ),
}


@dataclasses.dataclass
class ModelConfig:
  """Architecture of the networks; each has an encoder of its own."""

  # bert, roberta (XLM-R, too), modernbert, or your own class as
  # package.module:Name (docs/extending.md).
  encoder: str = 'bert'
  # Settings of the encoder: those of ModernBERT, or of your own.
  encoder_options: dict[str, Any] = dataclasses.field(default_factory=dict)
  preset: Literal['tiny', 'mini', 'small', 'base'] = 'base'
  num_layers: int = 0  # 0: the preset's.
  width: int = 0  # 0: the preset's.
  num_heads: int = 0  # 0: the preset's.
  mlp_width: int = 0  # 0: four times the width; of ModernBERT, 1.5 times.
  vocab_size: int = 0  # 0: the tokenizer's.
  pad_id: int = 0  # Set from the tokenizer.
  max_positions: int = 512
  # erf form, tanh form, or that of the encoder.
  activation: Literal['auto', 'gelu', 'gelu_new'] = 'auto'
  layer_norm_eps: float = -1.0  # <0: the encoder's.
  dropout: float = 0.1
  # Dropout of attention weights; <0: as `dropout`. Fused kernels need 0.
  attention_dropout: float = -1.0
  # xla: matmuls and softmax. cudnn, flash: fused kernels for NVIDIA GPUs and
  # TPUs. auto: fused if the device has it and no attention weight is dropped.
  attention: Literal['auto', 'xla', 'cudnn', 'flash'] = 'auto'
  # Recomputed in the backward pass of each layer: nothing, all but the matmuls
  # with weights, or everything.
  remat: Literal['none', 'dots', 'full'] = 'none'
  # Whether BERT's layers, except the last, are one loop, which compiles faster.
  # Without `remat` it keeps twice the activations.
  scan_layers: bool = False
  init_stddev: float = 0.02
  # The retrieval head (models/embedder.py). E is the width of the embedding;
  # with projection='none', it is that of the encoder.
  embedding_width: int = 128
  # cls_tanh: [CLS] through BERT's pooler (as released). cls, last: the first or
  # the last wordpiece. mean: the mean of all, [PAD] excluded.
  pooling: Literal['cls_tanh', 'cls', 'mean', 'last'] = 'cls_tanh'
  # From the pooled state to the embedding: a linear layer with a LayerNorm (as
  # released), a linear layer, or nothing.
  projection: Literal['layer_norm', 'linear', 'none'] = 'layer_norm'
  projection_norm_eps: float = 0.0  # 0: layer_norm_eps.
  normalize: bool = False  # Embeddings have L2 norm 1.
  # A score is s f(x, z): the inverse temperature of normalised embeddings. The
  # query embedding is multiplied by it. If learned, it starts from this value.
  score_scale: float = 1.0
  learn_score_scale: bool = False
  # Texts in front of every query and document, such as 'query: '.
  query_prefix: str = ''
  document_prefix: str = ''
  # segments: `title [SEP] body`, with segments 0 and 1 (REALM). pair: the same,
  # all segment 0 (DPR). text: title, title_separator and body as one text.
  titles: Literal['segments', 'pair', 'text'] = 'segments'
  title_separator: str = ' '
  # shared: one tower for queries and documents (as released). shared_bert: one
  # BERT, two projections (as in the paper). separate: two BERTs. Both towers
  # start from the same weights, unless a checkpoint has two.
  towers: Literal['shared', 'shared_bert', 'separate'] = 'shared'
  # Initial scale of the embedding's LayerNorm. With 1 (as released), scores are
  # within +-E, and a softmax over +-128 has no gradient; E**-0.25 bounds them
  # by sqrt(E), as training from scratch needs.
  embedding_scale_init: float = 1.0
  # The reader of open-domain questions (models/span_reader.py).
  span_width: int = 256  # Width of the MLP that scores an answer span.
  max_span_width: int = 10  # Maximum of an answer, in wordpieces.
  span_norm_eps: float = 1e-3
  # The tagger of named entities (models/tagger.py).
  entity_types: tuple[str, ...] = ()  # (): those of config.tagger.files.
  capitals: bool = True  # Capitalised words are segment 1 of its input.
  compute_dtype: Literal['float32', 'bfloat16'] = 'float32'


@dataclasses.dataclass
class LengthsConfig:
  """Static shapes, in wordpieces with [CLS] and [SEP]."""

  query: int = 96  # Q: [CLS] sentence [SEP].
  document: int = 288  # S: [CLS] title [SEP] body [SEP].
  masks: int = 10  # M: maximum of masked wordpieces per example.

  @property
  def joint(self) -> int:
    """T: [CLS] sentence [SEP] body [SEP]."""
    return self.query + self.document


@dataclasses.dataclass
class MlmConfig:
  """Reader warm-up, in place of a pretrained BERT (docs/learning.md)."""

  # Share of each batch in which a sentence of the knowledge corpus is read with
  # its own passage, from which the reader learns to look an answer up. The
  # other examples are sentences that REALM will mask, with a random passage or
  # the null document, from which it learns that most passages do not help.
  own_passage_rate: float = 0.8
  # Share of the null document in the other examples. With own_passage_rate=0,
  # 1 trains the baseline: a reader without passages.
  null_rate: float = 0.5
  # In place of both: the share of each view of a sentence of the knowledge
  # corpus, drawn for each example. `own`: its passage. `answer`: another
  # passage of the article, which holds the masked wordpieces. `article`:
  # another one, which does not. `random`: any passage. `null`: the null
  # document. Where the article has no such passage, `own` is shown.
  views: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class IctConfig:
  """The inverse cloze task (Lee et al. 2019, section 4)."""

  remove_rate: float = 0.9  # Share of sentences removed from their passage.
  # Files of questions with a passage that answers them, comma-separated, in
  # place of sentences (Karpukhin et al. 2020, in-batch negatives). The positive
  # of a divided record is a part that holds an answer.
  questions: str = ''


@dataclasses.dataclass
class OpenQaConfig:
  """Fine-tuning on questions (Lee et al. 2019, section 5.2)."""

  # Files of questions, comma-separated; see `realm-jax questions --help`.
  questions: str = ''
  retrieved: int = 5000  # Passages in the retriever's loss.
  read: int = 5  # Best passages, which the reader reads.
  title: bool = False  # The reader sees a passage's title.
  # The reader's inputs are padded to the next multiple of it that holds the
  # longest of a batch; a step is compiled for each. 0: to lengths.joint.
  length_step: int = 0
  # The reader does not run for a batch, or with `accumulate` for a part of it,
  # whose passages hold no answer: its loss and gradient are 0.
  skip_unreadable: bool = False
  # Over all spans of all passages read (as released), or p(z|x) p(y|z,x).
  normalization: Literal['global', 'passage'] = 'global'
  # frozen: passage embeddings are those of the initial index, only the question
  # encoder learns (as published). trained: the passages that are read are
  # embedded with current parameters and learn; the index may be refreshed.
  documents: Literal['frozen', 'trained'] = 'frozen'
  # Re-rank the top N with the current retriever before reading; 0: do not.
  rerank: int = 0
  # Whether a batch without any answer still applies weight decay and momentum.
  update_unanswered: bool = False


@dataclasses.dataclass
class TaggerConfig:
  """Training of a named-entity tagger for salient spans (docs/tagging.md)."""

  # Files of tagged sentences, comma-separated: columns, JSON or Parquet.
  files: str = ''
  tag_column: str = ''  # Name, or number from 1; '': the only one with tags.
  tag_names: tuple[str, ...] = ()  # For numbers; (): the files state them.
  length: int = 64  # L: [CLS] sentence [SEP]; longer ones take several rows.


@dataclasses.dataclass
class OptimizerConfig:
  """AdamW with a linear warm-up and a linear decay."""

  learning_rate: float = 3e-5  # Peak.
  retriever_learning_rate: float = -1.0  # Peak of the embedder; <0: the same.
  retriever_delay: int = 0  # First steps, in which the embedder does not learn.
  # Parameters that never change, by the first parts of their names: 'reader',
  # 'reader.bert.layers.0', 'embedder.encoder' (docs/learning.md).
  frozen: tuple[str, ...] = ()
  warmup_steps: int = -1  # <0: a tenth of the steps, at most 10,000.
  final_fraction: float = 0.0  # Final learning rate / peak.
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-6
  weight_decay: float = 0.01  # Not on biases and LayerNorms.
  clip_norm: float = 1.0  # Maximum of the global gradient norm.


@dataclasses.dataclass
class RefreshConfig:
  """Exchange of snapshots and index generations by trainer and builder."""

  # none: keep the index of step 0. sync: wait for each generation. scheduled:
  # adopt the generation of snapshot s exactly at step s + lag; wait only if the
  # builder is late. eager: adopt as soon as it is ready. adaptive: as
  # scheduled, but take a snapshot only if the index is too stale.
  policy: Literal['none', 'sync', 'scheduled', 'eager', 'adaptive'] = (
      'scheduled'
  )
  # The index in use is lag to lag + interval - 1 steps old, so by default never
  # older than the paper's 500 steps between refreshes (docs/refresh.md).
  interval: int = 250  # Steps between two snapshots of the retriever.
  lag: int = 250  # Steps from snapshot to adoption: `scheduled`, `adaptive`.
  # `adaptive`: take a snapshot if a smaller share of the probe queries' top k
  # in the index is still their top k under the current parameters.
  overlap_bound: float = 0.8
  # Training ends after this number of consecutive builder failures without a
  # new generation (with --with_index_builder); 0: restart without limit.
  max_builder_failures: int = 3
  timeout: float = 3600.0  # Seconds to wait for a generation.
  keep: int = 3  # Newest snapshots and generations kept; 0: all.


@dataclasses.dataclass
class MipsConfig:
  """Maximum inner product search over the document embeddings."""

  backend: str = 'exact'  # A key of BACKENDS, or `package.module:Name`.
  dtype: Literal['float32', 'bfloat16'] = 'float32'  # Embeddings' type.
  recall_target: float = 0.95  # `approx` only.
  # Selects the rows of `exact`. 'pallas': one kernel (index/fused_topk.py), for
  # dtype bfloat16 on NVIDIA GPUs; other devices use 'xla'.
  kernel: Literal['xla', 'pallas'] = 'xla'
  # `scann` only; 0: derived from the number of rows (index/scann.py).
  num_leaves: int = 0
  leaves_to_search: int = 0
  reorder: int = 0
  # Settings of a backend given as `package.module:Name`.
  options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class MeshConfig:
  """Devices; one of the two sizes may be -1: all remaining devices."""

  data: int = -1  # Divides the batch.
  model: int = 1  # Divides heads, MLP and vocabulary.
  zero: bool = False  # Axis `data` divides parameters and optimizer state, too.


@dataclasses.dataclass
class CheckpointConfig:
  interval: int = 1000  # Steps; the last step is always saved.
  keep: int = 3  # Newest checkpoints kept; 0: all.


@dataclasses.dataclass
class GatesConfig:
  """Conditions under which `realm` learns (docs/learning.md).

  `train` measures these figures on sentences held out, and warns of those on
  the wrong side. They change nothing that is trained.
  """

  interval: int = 100  # Steps between two measurements; 0: no gates.
  sentences: int = 128  # Masked sentences to measure on.
  # Least values. On another passage of the article that holds the answer:
  reader_accuracy: float = 0.5  # Share of spans with every wordpiece right.
  reader_utility: float = 1.0  # Mean of log p(y|z,x) - log p(y|null,x).
  # Share of sentences of which a retrieved passage holds the answer.
  answer_in_candidates: float = 0.3
  # Share of masked sentences whose own passage is among the best 20.
  recall_at_20: float = 0.3
  # Largest values: mean of p(null|x); share of sentences whose own text stands
  # around the answer in a retrieved passage.
  null_share: float = 0.9
  trivial_share: float = 0.05


@dataclasses.dataclass
class Config:
  """A training job; index building and evaluation read it, too."""

  # mlm, ict, realm, open_qa, tagger (trainer/stages), or your own class as
  # package.module:Class (docs/extending.md).
  objective: str = 'realm'
  corpus: str = ''  # Folder written by `realm-jax prepare`.
  # Workdirs with initial parameters, comma-separated; of several workdirs with
  # a component (`mlm` has a reader, `ict` an embedder, `realm` both), the last
  # one counts. A component that none has takes another one's BERT
  # (docs/checkpoints.md).
  init_from: str = ''
  seed: int = 0
  steps: int = 200_000
  batch_size: int = 512  # Rows on all devices together.
  # Parts of a batch that a step computes one after the other, to save memory.
  # `ict` then embeds twice, as its loss compares all examples.
  accumulate: int = 1
  num_candidates: int = 8  # K, with the null document.
  # False, an ablation: the null document has probability 0; the other K - 1
  # candidates stay the same.
  null_document: bool = True
  # Sentences to mask: `pretraining` (the corpus X of the paper), `knowledge`
  # (the sentences of the passages), `auto` (X if the corpus has one).
  sentences: Literal['auto', 'pretraining', 'knowledge'] = 'auto'
  # salient, random_span, random_token, bert, bert_whole_words
  # (corpus/masking.py), or your own function as package.module:name.
  masking: str = 'salient'
  # Settings of your own objective or mask.
  options: dict[str, Any] = dataclasses.field(default_factory=dict)
  # Excluded candidates, which give the answer away: the sentence's own passage
  # and those that hold its text, their whole articles, or none (an ablation).
  trivial: Literal['passage', 'article', 'none'] = 'passage'
  # span: sum_z p(z|x) prod_j p(y_j|z,x) (the paper). token: per masked
  # wordpiece (the released code).
  granularity: Literal['span', 'token'] = 'span'
  log_interval: int = 10  # Steps between two lines of metrics.jsonl.
  # Some of jsonl (always), tensorboard, wandb, mlflow, comma-separated.
  log_to: str = 'jsonl'
  tensorboard: bool = False  # The same as in log_to.
  # Peak TFLOP/s of one device, for the metric time/mfu; 0: unknown.
  peak_tflops: float = 0.0
  # Kernels of a GPU that give the same bits each time; slower. Set it with
  # `train --deterministic`, before XLA starts.
  deterministic: bool = False
  model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
  lengths: LengthsConfig = dataclasses.field(default_factory=LengthsConfig)
  mlm: MlmConfig = dataclasses.field(default_factory=MlmConfig)
  ict: IctConfig = dataclasses.field(default_factory=IctConfig)
  open_qa: OpenQaConfig = dataclasses.field(default_factory=OpenQaConfig)
  tagger: TaggerConfig = dataclasses.field(default_factory=TaggerConfig)
  optimizer: OptimizerConfig = dataclasses.field(
      default_factory=OptimizerConfig
  )
  refresh: RefreshConfig = dataclasses.field(default_factory=RefreshConfig)
  mips: MipsConfig = dataclasses.field(default_factory=MipsConfig)
  gates: GatesConfig = dataclasses.field(default_factory=GatesConfig)
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
  checkpoint: CheckpointConfig = dataclasses.field(
      default_factory=CheckpointConfig
  )


def resolve(config: Config) -> Config:
  """Returns a copy in which derived defaults, such as `width=0`, are set."""
  config = copy.deepcopy(config)
  complete(config.model)
  if config.model.projection == 'none':
    config.model.embedding_width = config.model.width
  if config.optimizer.retriever_learning_rate < 0:
    config.optimizer.retriever_learning_rate = config.optimizer.learning_rate
  if config.optimizer.warmup_steps < 0:
    config.optimizer.warmup_steps = default_warmup(config.steps)
  return config


def complete(model: ModelConfig) -> None:
  """Sets the fields that stand for a default of the encoder.

  An encoder of your own has the defaults of BERT.
  """
  encoder = ENCODERS.get(model.encoder, ENCODERS['bert'])
  if model.preset in PRESETS:
    base = model.preset == 'base'
    layers, width, heads = encoder.base if base else PRESETS[model.preset]
    model.num_layers = model.num_layers or layers
    model.width = model.width or width
    model.num_heads = model.num_heads or heads
    model.mlp_width = model.mlp_width or int(encoder.mlp_ratio * model.width)
  if model.activation == 'auto':
    model.activation = encoder.activation
  if model.layer_norm_eps < 0:
    model.layer_norm_eps = encoder.layer_norm_eps


def default_warmup(steps: int) -> int:
  """Returns the value of optimizer.warmup_steps for a negative one."""
  return min(10_000, steps // 10)


def attention_rate(model: ModelConfig) -> float:
  """Returns the dropout rate of attention weights."""
  rate = model.attention_dropout
  return model.dropout if rate < 0 else rate


def is_null_reader(config: Config) -> bool:
  """Returns whether the job trains the baseline, a reader without passages."""
  if config.objective != 'mlm':
    return False
  if config.mlm.views:
    return config.mlm.views.get('null') == 1
  return (config.mlm.own_passage_rate, config.mlm.null_rate) == (0, 1)


def documents_are_frozen(config: Config) -> bool:
  """Returns whether documents keep the embeddings of the first index."""
  if config.objective == 'open_qa' and config.open_qa.documents == 'frozen':
    return True
  tower = {'embedder.encoder'}
  if config.model.projection != 'none':
    tower.add('embedder.projection')
  frozen = set(config.optimizer.frozen)
  return 'embedder' in frozen or tower <= frozen


# These need the tree above.
from realm_jax.config.validation import HEAD_FIELDS as HEAD_FIELDS  # noqa: E402
from realm_jax.config.validation import differences as differences  # noqa: E402
from realm_jax.config.validation import digest as digest  # noqa: E402
from realm_jax.config.validation import fields as fields  # noqa: E402
from realm_jax.config.validation import flat as flat  # noqa: E402
from realm_jax.config.validation import from_dict as from_dict  # noqa: E402
from realm_jax.config.validation import identity as identity  # noqa: E402
from realm_jax.config.validation import read as read  # noqa: E402
from realm_jax.config.validation import to_dict as to_dict  # noqa: E402
from realm_jax.config.validation import validate as validate  # noqa: E402
