"""The PyTorch side of benchmarks/open_qa_step.py, which starts this file.

Runs in the Python given as --torch_python, with PyTorch and transformers
4.40.2. Each request `step` is one step of RealmForOpenQA, the answer its
seconds.
"""

import itertools
import json
import pathlib
import sys
import time

import harness
import numpy as np
import torch
import transformers


def main() -> None:
  folder, retrieved = pathlib.Path(sys.argv[1]), int(sys.argv[2])
  torch.set_num_threads(2)
  transformers.logging.set_verbosity_error()
  with open(folder / 'blocks.jsonl', encoding='utf-8') as file:
    blocks = [json.loads(line).encode() for line in file]
  with open(folder / 'questions.jsonl', encoding='utf-8') as file:
    questions = [json.loads(line) for line in file]
  tokenizer = transformers.RealmTokenizerFast(
      tokenizer_object=transformers.BertTokenizerFast(
          vocab_file=str(folder / 'vocab.txt'), do_lower_case=True
      )._tokenizer,
      unk_token='[UNK]', sep_token='[SEP]', pad_token='[PAD]',
      cls_token='[CLS]', mask_token='[MASK]',
  )
  size = {}
  if sys.argv[3] == 'tiny':
    size = {
        'hidden_size': 128, 'num_hidden_layers': 2, 'num_attention_heads': 2,
        'intermediate_size': 512,
    }
  config = transformers.RealmConfig(
      vocab_size=len(tokenizer),
      num_block_records=len(blocks),
      searcher_beam_size=retrieved,
      reader_beam_size=5,
      reader_seq_len=320,
      **size,
  )
  retriever = transformers.RealmRetriever(
      np.array(blocks, dtype=object), tokenizer
  )
  model = transformers.RealmForOpenQA(config, retriever).train()
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
  spent = []
  call = type(retriever).__call__

  def timed(self, *args, **kwargs):
    start = time.perf_counter()
    result = call(self, *args, **kwargs)
    spent.append(time.perf_counter() - start)
    return result

  type(retriever).__call__ = timed
  order = itertools.cycle(questions)

  def answer(do, _):
    if do == 'versions':
      return {
          'torch': torch.__version__, 'transformers': transformers.__version__
      }
    question, answers = next(order)
    encoded = tokenizer([question], return_tensors='pt')
    answer_ids = tokenizer(
        answers, add_special_tokens=False, return_token_type_ids=False,
        return_attention_mask=False,
    ).input_ids
    start = time.perf_counter()
    found = model(**encoded, answer_ids=answer_ids, return_dict=True)
    found.reader_output.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return {'retrieve': spent[-1], 'step': time.perf_counter() - start}

  harness.serve(answer)


if __name__ == '__main__':
  main()
