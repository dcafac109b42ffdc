"""The table of the commands of `realm-jax`, with all their flags."""

from collections.abc import Callable
import dataclasses

from realm_jax.cli import actions
from realm_jax.cli.flags import REQUIRED
from realm_jax.cli.flags import ConfigFlag
from realm_jax.cli.flags import Flag


class Command:
  """One command, `realm-jax NAME`.

  summary: one sentence.
  example: arguments after the name.
  action: called with the positional arguments, and the flags as keywords.
  flags: missing flags are reported in this order.
  positional: describes the positional arguments; empty: the command has none.
  """

  def __init__(
      self,
      summary: str,
      example: str,
      action: Callable[..., None],
      *flags: Flag,
      positional: str = '',
  ):
    self.summary, self.example, self.action = summary, example, action
    self.flags, self.positional = flags, positional


_CONFIG = ConfigFlag(
    'config', str, 'Experiment file, FILE.py or FILE.py:ARGUMENT; override its'
    ' fields with --config.FIELD=VALUE.', REQUIRED,
)
_WORKDIR = Flag(
    'workdir', str, 'Folder of the job: config, checkpoints, index, metrics.',
    REQUIRED,
)
_CORPUS = Flag(
    'corpus', str, 'Where the corpus of the workdir is now, if it has moved.'
)
_OUTPUT = Flag('output', str, 'Folder to write.', REQUIRED)
_OVERWRITE = Flag('overwrite', bool, 'Replace the output folder.', False)
_SKIP_BAD_RECORDS = Flag(
    'skip_bad_records', bool, 'Count and list malformed lines, do not stop.',
    False,
)
_FORMAT = Flag(
    'format', str, 'Format of all files: jsonl, json, csv, tsv, tsv-plain,'
    ' parquet, text, wikiextractor or mediawiki; default: recognised by their'
    ' content.',
)
_FIELDS = Flag(
    'fields', str, 'Names of fields or columns, such as id:_id,text:contents,'
    ' or their numbers; default: the usual names.',
)
_WORKERS = Flag('workers', int, 'Processes; default: one for each core.')
_JSON = Flag('json', bool, 'Print JSON.', False)
# The processes of a job.
_PROCESSES = (
    Flag('coordinator', str,
         'HOST:PORT of process 0, where a job has several, one on each host.'),
    Flag('num_processes', int, 'How many the job has.'),
    Flag('process_id', int, 'Which of them this is, from 0 on.'),
    Flag('distributed', bool, 'Find out these three from SLURM, Kubernetes,'
         ' Open MPI or the TPU slice.', False),
    Flag('coordinator_timeout', float,
         'Seconds to wait for the other processes.', 300.0),
)
# Flags of `add` and `update`.
_RECORDS = (
    _WORKDIR,
    _CORPUS,
    Flag('input', str, 'Records as `prepare` reads them, each with an id:'
         ' files, folders, globs or data sets, comma-separated.', REQUIRED),
    _FORMAT,
    _FIELDS,
    _SKIP_BAD_RECORDS,
    _WORKERS,
)
# How a question set is read.
_QUESTION_SET = (
    Flag('format', str, 'Format of the questions, such as dpr, squad,'
         ' curated_trec or tsv-plain; docs/question_answering.md lists them.',
         'auto'),
    Flag('fields', str, 'Names of fields, or numbers of columns, such as'
         ' question:query,id:qid,answers:4.'),
    Flag('qrels', str, 'File of the relevance of passages, by the ids of'
         ' questions: TREC, MS MARCO, BEIR.'),
)

# By name, in the order of the help.
COMMANDS = {
    'prepare': Command(
        'Turns text into a corpus: passages, sentences, salient spans.',
        '--source=articles/*.jsonl --output=corpus',
        actions.prepare,
        Flag('source', str, 'Articles or passages, comma-separated: files (JSON'
             ' Lines, JSON, CSV, TSV, Parquet, text, WikiExtractor, dumps of'
             ' MediaWiki; .gz, .xz, .bz2, .zst too), folders, globs, tfds:NAME,'
             ' hf:NAME, ir:NAME, package.module:Name[:TEXT]; or'
             ' world:SEED[:ENTITIES].'),
        _FORMAT,
        _FIELDS,
        Flag('pretraining_source', str, 'A separate corpus to take the masked'
             ' sentences from; default: the source itself.'),
        _OUTPUT,
        Flag('vocab', str, 'vocab.txt, tokenizer.json, tokenizer folder or hub'
             ' id; default: trained on the source.'),
        Flag('vocab_size', int, 'Wordpieces of a vocabulary trained here.',
             30522),
        Flag('cased', bool, 'Keep the case of the texts, for a vocabulary'
             ' trained here or a vocab.txt alone; default: as the tokenizer'
             ' says, or else in lower case.'),
        Flag('max_wordpieces', int,
             'Longest passage, with title and specials.', 288),
        Flag('validation_fraction', float, 'Share of the articles whose'
             ' sentences are set aside for evaluation.', 0.01),
        Flag('exclude', list, 'Kinds of articles to leave out, of lists,'
             ' indices, outlines, disambiguation; or `all`.', []),
        Flag('spans', ('auto', 'rules', 'random', 'none'), 'Where salient spans'
             ' come from, in records without `spans`; auto: rules for English,'
             ' and none in other languages.', 'auto'),
        Flag('language', str, 'Language of the texts, such as en, de, zh;'
             ' default: examined.'),
        Flag('near_duplicates', float, 'Leave out records of this similarity to'
             ' an earlier one, such as 0.8.'),
        _WORKERS,
        _SKIP_BAD_RECORDS,
        Flag('beam', str, 'Options of an Apache Beam pipeline to do the work,'
             " in one string: '' or '--runner=FlinkRunner"
             " --flink_master=host:8081'."),
        Flag('stats', bool, 'Describe the corpus: figures in stats.json, a plot'
             ' in stats.png; without --source, the existing corpus at'
             ' --output.', False),
        _OVERWRITE,
    ),
    'tag': Command(
        'Writes a corpus with the names of a tagger as salient spans.',
        '--corpus=corpus --tagger=runs/tagger --output=tagged',
        actions.tag,
        Flag('corpus', str, 'Folder that `prepare` wrote.', REQUIRED),
        Flag('tagger', str, 'Workdir of the objective `tagger`.', REQUIRED),
        _OUTPUT,
        Flag('dates_and_numbers', bool,
             'Keep the dates and numbers that the rules found.', True),
        _OVERWRITE,
    ),
    'plan': Command(
        'Estimates memory, disk, FLOP, time and devices of a job.',
        '--config=experiments/realm_base.py:realm --passages=13353718'
        ' --config.model.vocab_size=30522 --chip=h100 --trainer_devices=64'
        ' --builder_devices=16',
        actions.plan,
        dataclasses.replace(_CONFIG, default=None),  # --chip=list needs none.
        Flag('passages', int, 'Size of the corpus; default: of config.corpus.'),
        Flag('mean_wordpieces', float, 'Mean length of a passage, with title'
             ' and specials; default: of config.corpus, or else the maximum,'
             ' config.lengths.document.'),
        Flag('chip', str, 'Type of all devices; `--chip=list` lists them.',
             'h100'),
        Flag('trainer_devices', int, 'Number of chips that train.', 1),
        Flag('builder_devices', int, 'Number of chips that embed the corpus; 0:'
             ' the trainer chips do both in turn.', 1),
        Flag('peak_tflops', float, "Peak of a chip; default: its vendor's."),
        Flag('memory_gb', float, "Memory of a chip; default: its vendor's."),
        Flag('utilization', float,
             'Share of the peak that a training step reaches.', 0.4),
        Flag('builder_utilization', float,
             'Share of the peak that the embedding of passages reaches.', 0.5),
        Flag('price', float, 'Price of a chip for an hour.', 0.0),
        Flag('compile', bool,
             'Compile the step here; show the memory that XLA needs.', False),
        _JSON,
    ),
    'train': Command(
        'Trains one objective: mlm, ict, realm, open_qa or tagger.',
        '--config=experiments/quickstart.py:ict --workdir=runs/ict'
        ' --config.corpus=corpus',
        actions.train,
        _CONFIG,
        _WORKDIR,
        *_PROCESSES,
        Flag('profile', str,
             'Steps to trace, for example 10-15, to WORKDIR/profile.'),
        Flag('deterministic', bool, 'On a GPU, only kernels that give the same'
             ' bits each time. They are slower.', False),
        Flag('with_index_builder', bool, 'Start and supervise the index'
             ' builder, on one machine. Otherwise run `realm-jax index'
             ' --follow` as a second job.', False),
    ),
    'index': Command(
        'Builds index generations for a running trainer.',
        '--workdir=runs/realm --follow',
        actions.index,
        _WORKDIR,
        _CORPUS,
        *_PROCESSES,
        Flag('follow', bool, 'Build a generation from each new snapshot until'
             ' training is done. Otherwise build one and exit.', False),
        Flag('step', int, 'Snapshot to build from; default: the newest.'),
        Flag('start_timeout', float, 'Seconds to wait for the trainer to write'
             ' its config and first snapshot.', 600.0),
        Flag('parent_pid', int, 'Exit when this process ends; 0: never.', 0),
    ),
    'index verify': Command(
        'Checks every byte of the index and its provenance.',
        '--workdir=runs/realm',
        actions.verify,
        _WORKDIR,
        _CORPUS,
        Flag('step', int, 'Generation to check; default: all.'),
    ),
    'index info': Command(
        'Lists the generations, their users, and the state of the builder.',
        '--workdir=runs/realm --json',
        actions.info,
        _WORKDIR,
        _JSON,
    ),
    'index add': Command(
        'Adds documents to a trained job.',
        '--workdir=runs/realm --input=more.jsonl',
        actions.add,
        *_RECORDS,
    ),
    'index update': Command(
        'Replaces documents by their ids.',
        '--workdir=runs/realm --input=more.jsonl',
        actions.update,
        *_RECORDS,
        Flag('ignore_missing', bool, 'Add documents with unknown ids.', False),
    ),
    'index delete': Command(
        'Removes documents by their ids.',
        '--workdir=runs/realm --input=ids.txt',
        actions.delete,
        _WORKDIR,
        _CORPUS,
        Flag('input', str, 'Ids: a table with an id, such as JSON Lines, or any'
             ' other file, with an id on each line; .gz, .xz too.', REQUIRED),
        Flag('ignore_missing', bool, 'Ignore unknown ids.', False),
    ),
    'index compact': Command(
        'Writes all additions and removals as one plain corpus.',
        '--workdir=runs/realm',
        actions.compact,
        _WORKDIR,
        _CORPUS,
        Flag('output', str, 'Folder for the corpus; default: documents/corpus-N'
             ' in the workdir.'),
    ),
    'evaluate': Command(
        'Measures retrieval and reading: JSON, a table and a plot.',
        '--workdir=runs/realm --questions=dev.jsonl',
        actions.evaluate,
        _WORKDIR,
        Flag('questions', str, 'JSON Lines of {question, answers, match,'
             ' passage_id}, or a question set as published (see `realm-jax'
             " questions --help`); default: the corpus' questions.jsonl if it"
             ' has one.'),
        *_QUESTION_SET,
        Flag('answer_match', ('squad', 'dpr', 'regex'), 'When a passage holds'
             ' an answer; default: dpr, and regex for regular expressions.'),
        Flag('unknown_gold', ('miss', 'skip'), 'Whether a gold passage that the'
             ' corpus lacks counts as not retrieved, or is left out.', 'miss'),
        Flag('tagged', str, 'For a tagger: files of tagged sentences,'
             ' comma-separated; columns, JSON or Parquet (docs/tagging.md).'),
        Flag('tag_column', str, 'Column of the tags in --tagged: its name, or'
             ' number from 1; default: as in training.'),
        Flag('tag_names', str, 'Tags of the numbers 0, 1, ... in --tagged,'
             ' comma-separated; default: as in training.'),
        Flag('corpus', str, 'Where the training corpus is now, or another one'
             ' of the same tokenizer to search in its place.'),
        Flag('steps', str, '`latest`, `all` (every remaining snapshot and'
             ' checkpoint), or numbers, comma-separated.', 'latest'),
        Flag('limit', int, 'Maximum number of questions and of sentences.'),
        Flag('read', int, 'Passages to read for a question or a masked'
             ' sentence; default: as in training.'),
        Flag('run_file', str, 'Also write the retrieved passages to this file,'
             ' for trec_eval, ir-measures or pyserini.'),
        Flag('bm25', bool, 'Also measure BM25, and its hybrid with the'
             ' retriever, with paired tests.', False),
        Flag('beir', str, 'Folder of BEIR to measure by nDCG@10, recall@100 and'
             ' MAP. One that does not exist, or with --questions: corpus and'
             ' questions are written to it.'),
    ),
    'compare': Command(
        'Compares two evaluations question by question, with a paired test.',
        'runs/a/evaluation/600.questions.jsonl'
        ' runs/b/evaluation/600.questions.jsonl',
        actions.compare,
        positional='OURS THEIRS',
    ),
    'doctor': Command(
        'Says what is wrong with a run: exit status 1, or 0 if nothing is.',
        '--workdir=runs/realm',
        actions.doctor,
        _WORKDIR,
        _JSON,
    ),
    'report': Command(
        'Writes one HTML page of a run, or of several side by side.',
        '--workdir=runs/ict,runs/realm --output=report.html',
        actions.report,
        Flag('workdir', str, 'Folders of jobs, comma-separated.', REQUIRED),
        Flag('output', str, 'File to write.', 'report.html'),
        Flag('inspect', str, 'A sentence with [MASK], for each model to fill'
             ' in; without it, no model is loaded.'),
        _CORPUS,
    ),
    'inspect': Command(
        'Shows the retrieved passages and predictions for one sentence.',
        '--workdir=runs/realm "The capital is [MASK]."',
        actions.inspect,
        _WORKDIR,
        _CORPUS,
        Flag('k', int,
             'Candidates, null document included; default: as in training.'),
        Flag('html', str, 'Also write a page to this file.'),
        positional='SENTENCE',
    ),
    'import': Command(
        'Makes a workdir from published retrievers, BERT or REALM.',
        '--source=bert-base-uncased --workdir=runs/bert',
        actions.import_,
        Flag('source', str, 'Checkpoints of BERT or REALM: folders or Hugging'
             ' Face hub ids, comma-separated, for one job.', REQUIRED),
        _WORKDIR,
        Flag('components', str, 'Some of embedder, reader, span_reader,'
             ' tagger; default: all but a tagger.'),
        Flag('body', str, 'Prefix of the tensors to take from a file with'
             ' several BERTs, such as question_model.'),
        Flag('query_source', str, 'The query tower of a retriever whose'
             ' document tower is a --source. The two encoders of DPR in'
             ' --source are recognised.'),
        Flag('pooling', ('cls_tanh', 'cls', 'mean', 'last'),
             'The checkpoint is a retriever without a projection, with this'
             ' pooling. Not needed where the folder has modules.json.'),
        Flag('normalize', bool, 'Embeddings have L2 norm 1; default: as'
             ' modules.json says, or not.'),
        Flag('query_prefix', str, "Text in front of a query, such as 'query: ';"
             " default: the folder's prompt."),
        Flag('document_prefix', str, "The same of a document: 'passage: '."),
        Flag('titles', ('segments', 'pair', 'text'),
             'Title and body are two segments, a pair of segment 0, or one'
             ' text; default: text, and pair for DPR.'),
        Flag('title_separator', str, 'Between title and body of one text;'
             ' default: a space.'),
        Flag('corpus', str, 'A corpus prepared with the vocabulary of the'
             ' checkpoint, for `index` and `evaluate`. An open-QA checkpoint'
             ' brings its own.'),
        Flag('vocab', str, "Vocabulary; default: the checkpoint's."),
        Flag('blocks', str, 'block_records.npy of an open-QA checkpoint whose'
             ' folder has none.'),
        _WORKERS,
        Flag('seed', int, 'For parameters that a checkpoint does not have.', 0),
    ),
    'export': Command(
        'Exports a model to transformers, sentence-transformers or FAISS.',
        '--workdir=runs/realm --format=huggingface --output=model',
        actions.export,
        _WORKDIR,
        _CORPUS,
        Flag('format', ('huggingface', 'sentence-transformers', 'index'),
             'Format of the output.', REQUIRED),
        _OUTPUT,
        Flag('step', int, 'Checkpoint, or snapshot of the retriever; default:'
             ' the newest checkpoint.'),
        Flag('classes', str, 'For huggingface: some of embedder, scorer,'
             ' encoder, reader, openqa, bert, tagger, comma-separated; default:'
             ' those of the workdir.'),
        Flag('dtype', ('float32', 'float16'), 'For index: of the embeddings.',
             'float32'),
    ),
    'questions': Command(
        'Converts a published question set, and splits it as ORQA did.',
        '--source=trainmodel.json --output=webquestions --split',
        actions.questions,
        Flag('source', str, 'A question set as it was published, a folder of'
             ' BEIR, tfds:NAME[/CONFIG][:SPLIT], hf:NAME[:CONFIG[:SPLIT]], or'
             ' ir:NAME of ir_datasets.',
             REQUIRED),
        _OUTPUT,
        *_QUESTION_SET,
        Flag('split', bool, 'Divide a published training set into train and'
             ' dev as ORQA and REALM did.', False),
    ),
    'ask': Command(
        'Answers questions from the passages of a corpus.',
        '--workdir=runs/open_qa "who founded Delatuk?"',
        actions.ask,
        _WORKDIR,
        _CORPUS,
        Flag('k', int, 'Passages to read; default: as in training.'),
        Flag('step', int, 'Checkpoint step; default: newest.'),
        Flag('json', bool, 'Print a JSON object for each question.', False),
        positional='[QUESTION]',
    ),
    'serve': Command(
        'Serves a page and a JSON API to ask, fill in, search and embed.',
        '--workdir=runs/open_qa',
        actions.serve,
        _WORKDIR,
        _CORPUS,
        Flag('host', str, 'Address to listen on; any but a loopback address'
             ' needs --token.', '127.0.0.1'),
        Flag('port', int, 'Port to listen on; 0: any free one.', 8000),
        Flag('follow', bool, 'Adopt new checkpoints, index generations and'
             ' documents without a restart.', False),
        Flag('token', str, 'Secret that requests must carry; default: that of'
             ' the environment variable REALM_JAX_TOKEN.'),
    ),
}
