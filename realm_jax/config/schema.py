"""The tree of a configuration: its sections, fields and defaults.

The defaults are the paper's (Guu et al. 2020, section 4 and appendix A), except
those of `refresh`.
"""

import copy
import dataclasses
from typing import Any, Literal

# Sizes of the published small BERTs (Turc et al. 2019) and of BERT-base:
# layers, width, heads. The MLP is four times as wide as the encoder.
PRESETS = {
    'tiny': (2, 128, 2),
    'mini': (4, 256, 4),
    'small': (4, 512, 8),
    'base': (12, 768, 12),
}

# Search backends and where they are defined; see index/search.py.
BACKENDS = {
    'exact': 'realm_jax.index.search:ExactSearch',
    'approx': 'realm_jax.index.search:ApproxSearch',
    'scann': 'realm_jax.index.scann:ScannSearch',
}


@dataclasses.dataclass
class ModelConfig:
  """Architecture of the embedder and of the reader (two separate BERTs)."""

  preset: Literal['tiny', 'mini', 'small', 'base'] = 'base'
  num_layers: int = 0  # 0: the preset's.
  width: int = 0  # 0: the preset's.
  num_heads: int = 0  # 0: the preset's.
  mlp_width: int = 0  # 0: four times the width.
  vocab_size: int = 0  # 0: that of the corpus' tokenizer.
  max_positions: int = 512
  activation: Literal['gelu', 'gelu_new'] = 'gelu_new'  # erf or tanh form.
  layer_norm_eps: float = 1e-12
  dropout: float = 0.1
  # Of the attention weights; <0: as `dropout`. Fused kernels have none.
  attention_dropout: float = -1.0
  # xla: matmuls and softmax. cudnn, flash: fused kernels of NVIDIA GPUs and of
  # TPUs. auto: the fused one wherever it can run and nothing is dropped.
  attention: Literal['auto', 'xla', 'cudnn', 'flash'] = 'auto'
  # What the backward pass recomputes of each layer: nothing, all but the
  # matmuls with weights, or everything.
  remat: Literal['none', 'dots', 'full'] = 'none'
  init_stddev: float = 0.02
  embedding_width: int = 128  # E, of the retrieval embedding.
  # `shared`: one tower for queries and documents (as released). `shared_bert`:
  # one BERT, a projection each (as the paper writes it). `separate`: two BERTs.
  # Both towers begin as the same one, unless a checkpoint has two.
  towers: Literal['shared', 'shared_bert', 'separate'] = 'shared'
  # Initial scale of the embedding's LayerNorm. At 1 (as released) the inner
  # product of two embeddings is up to E; E**-0.25 starts it at up to sqrt(E),
  # which learning from scratch needs: a softmax over +-128 has no gradient.
  embedding_scale_init: float = 1.0
  # The reader of open-domain questions (models/span_reader.py).
  span_width: int = 256  # Of the MLP that scores an answer span.
  max_span_width: int = 10  # Wordpieces of an answer, at most.
  span_norm_eps: float = 1e-3
  # The tagger of named entities (models/tagger.py).
  entity_types: tuple[str, ...] = ()  # (): those of config.tagger.files.
  # Whether it sees, as segment 1, which words have a capital letter.
  capitals: bool = True
  compute_dtype: Literal['float32', 'bfloat16'] = 'float32'


@dataclasses.dataclass
class LengthsConfig:
  """Static shapes, in wordpieces with [CLS] and [SEP]."""

  query: int = 96  # Q: [CLS] sentence [SEP].
  document: int = 288  # S: [CLS] title [SEP] body [SEP].
  masks: int = 10  # M: masked wordpieces per example, at most.

  @property
  def joint(self) -> int:
    """T: [CLS] sentence [SEP] body [SEP]."""
    return self.query + self.document


@dataclasses.dataclass
class MlmConfig:
  """Reader warm-up: stands in for a pretrained BERT where there is none."""

  # Share of each batch in which a sentence of the knowledge corpus sees its own
  # passage: the reader learns to look there. The other examples are sentences
  # that REALM will mask, with a passage at random or the null document: the
  # reader learns to read, and that most passages are of no use.
  own_passage_rate: float = 0.8
  # Share of the null document in those other examples. 1, with own_passage_rate
  # 0: trains a reader without passages, the baseline of REALM's.
  null_rate: float = 0.5


@dataclasses.dataclass
class IctConfig:
  """The inverse cloze task (Lee et al. 2019, section 4)."""

  remove_rate: float = 0.9  # How often the sentence is cut from its passage.
  # Questions with a passage that answers them, in the place of sentences:
  # files, comma-separated (Karpukhin et al. 2020, in-batch negatives). The
  # positive of a divided record is a part that holds an answer.
  questions: str = ''


@dataclasses.dataclass
class OpenQaConfig:
  """Fine-tuning on questions (Lee et al. 2019, section 5.2)."""

  # Files of questions, comma-separated; see `realm-jax questions --help`.
  questions: str = ''
  retrieved: int = 5000  # Passages that the retriever's loss is taken over.
  read: int = 5  # The best of them, which the reader reads.
  title: bool = False  # Whether the reader sees a passage's title.
  # Over all spans of all passages read (as released), or p(z|x) p(y|z,x).
  normalization: Literal['global', 'passage'] = 'global'
  # frozen: the index is that of the initial retriever, and the question is
  # what learns (as published). trained: the passages that are read are embedded
  # anew and learn too; the index may be refreshed.
  documents: Literal['frozen', 'trained'] = 'frozen'
  # So many of the best are put in order anew by the current retriever before
  # the reader gets its share; 0: the order of the index.
  rerank: int = 0
  # Whether a batch of which no question has an answer is a step all the same,
  # of weight decay and of old momentum.
  update_unanswered: bool = False


@dataclasses.dataclass
class TaggerConfig:
  """Learning to find named entities, for salient spans (docs/tagging.md)."""

  # Files of tagged sentences, comma-separated: CoNLL, or JSON Lines.
  files: str = ''
  length: int = 64  # L: [CLS] sentence [SEP]; a longer one takes several rows.


@dataclasses.dataclass
class OptimizerConfig:
  """AdamW with a linear warm-up and a linear decay."""

  learning_rate: float = 3e-5  # Peak.
  retriever_learning_rate: float = -1.0  # Of the embedder; <0: the same.
  retriever_delay: int = 0  # Steps in which the retriever does not learn yet.
  frozen: tuple[str, ...] = ()  # Components that never change: 'embedder', ...
  warmup_steps: int = -1  # <0: a tenth of the steps, at most 10,000.
  final_fraction: float = 0.0  # Learning rate at the end, of the peak.
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-6
  weight_decay: float = 0.01  # Not on biases and LayerNorms.
  clip_norm: float = 1.0  # Of the global gradient norm.


@dataclasses.dataclass
class RefreshConfig:
  """How the trainer and the index builder keep the index fresh."""

  # none: the index of step 0 for ever. sync: wait for each generation.
  # scheduled: adopt the generation of snapshot s exactly at step s + lag, and
  # wait only if the builder is late. eager: adopt as soon as it is ready.
  # adaptive: as scheduled, but take a snapshot only if the index is too stale.
  policy: Literal['none', 'sync', 'scheduled', 'eager', 'adaptive'] = (
      'scheduled'
  )
  # The index in use is `lag` to lag + interval - 1 steps old: with these, never
  # older than the 500 steps between two refreshes of the paper; docs/refresh.md
  # has the reason.
  interval: int = 250  # Steps between two snapshots of the retriever.
  lag: int = 250  # Steps from snapshot to adoption: `scheduled`, `adaptive`.
  # `adaptive`: a snapshot is taken when the share of the probe queries' top k
  # that is still right falls below.
  overlap_bound: float = 0.8
  # A builder that ended so often in a row, with nothing published in between,
  # ends the training that supervises it; 0: it is started again for ever.
  max_builder_failures: int = 3
  timeout: float = 3600.0  # Seconds to wait for a generation before giving up.
  keep: int = 3  # Newest snapshots and generations kept; 0: all of them.


@dataclasses.dataclass
class MipsConfig:
  """Maximum inner product search over the document embeddings."""

  backend: str = 'exact'  # A key of BACKENDS, or `package.module:Name`.
  dtype: Literal['float32', 'bfloat16'] = 'float32'  # Of the embedding table.
  recall_target: float = 0.95  # Of `approx`.
  # ScaNN; 0: chosen from the number of rows (see index/scann.py).
  num_leaves: int = 0
  leaves_to_search: int = 0
  reorder: int = 0
  # Settings of a backend given as `package.module:Name`.
  options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class MeshConfig:
  """Devices; one of the two sizes may be -1: all that remain."""

  data: int = -1  # The batch is divided over it.
  model: int = 1  # Heads, MLP and vocabulary are.
  zero: bool = False  # Parameters and optimizer state divided over data, too.


@dataclasses.dataclass
class CheckpointConfig:
  interval: int = 1000  # Steps; the last step is always saved.
  keep: int = 3  # Newest checkpoints kept; 0: all of them.


@dataclasses.dataclass
class Config:
  """One training job. Index building and evaluation read it back."""

  # mlm, ict, realm, open_qa, tagger (trainer/stages), or a class of one's own,
  # package.module:Class (docs/extending.md).
  objective: str = 'realm'
  corpus: str = ''  # Folder written by `realm-jax prepare`.
  # Workdirs to start from, comma-separated; each gives the components it has
  # (`mlm` a reader, `ict` an embedder, `realm` both), later ones win. A
  # component that none has begins with another one's BERT
  # (docs/checkpoints.md).
  init_from: str = ''
  seed: int = 0
  steps: int = 200_000
  batch_size: int = 512  # Of all devices together.
  # In how many parts, one after the other, a step computes its batch: memory
  # for time. `ict` then embeds twice, as each example needs all the others.
  accumulate: int = 1
  num_candidates: int = 8  # K; counts the null document.
  # Whether the null document can have a probability (False: an ablation; the
  # other K - 1 candidates stay the same).
  null_document: bool = True
  # Which sentences to mask: `pretraining` (the corpus X of the paper),
  # `knowledge` (the sentences of the passages), `auto` (X if there is one).
  sentences: Literal['auto', 'pretraining', 'knowledge'] = 'auto'
  # salient, random_span, random_token (corpus/masking.py), or a function of
  # one's own, package.module:name.
  masking: str = 'salient'
  # Settings of an objective or a mask of one's own.
  options: dict[str, Any] = dataclasses.field(default_factory=dict)
  # Candidates that give the answer away: the passage that the sentence is from
  # and those that hold its text, their whole articles, or none removed (an
  # ablation).
  trivial: Literal['passage', 'article', 'none'] = 'passage'
  # span: sum_z p(z|x) prod_j p(y_j|z,x), the paper. token: per masked
  # wordpiece, the released code.
  granularity: Literal['span', 'token'] = 'span'
  log_interval: int = 10  # Steps between two lines of metrics.jsonl.
  tensorboard: bool = False  # Needs the extra [tensorboard].
  # TFLOP/s of one device at best, for the metric time/mfu; 0: unknown.
  peak_tflops: float = 0.0
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
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
  checkpoint: CheckpointConfig = dataclasses.field(
      default_factory=CheckpointConfig
  )


def resolve(config: Config) -> Config:
  """Returns a copy in which every 'the preset's' and 'default' is filled in."""
  config = copy.deepcopy(config)
  model = config.model
  if model.preset in PRESETS:
    layers, width, heads = PRESETS[model.preset]
    model.num_layers = model.num_layers or layers
    model.width = model.width or width
    model.num_heads = model.num_heads or heads
    model.mlp_width = model.mlp_width or 4 * model.width
  if config.optimizer.retriever_learning_rate < 0:
    config.optimizer.retriever_learning_rate = config.optimizer.learning_rate
  if config.optimizer.warmup_steps < 0:
    config.optimizer.warmup_steps = min(10_000, config.steps // 10)
  return config


def attention_rate(model: ModelConfig) -> float:
  """The rate at which attention weights are dropped."""
  rate = model.attention_dropout
  return model.dropout if rate < 0 else rate
