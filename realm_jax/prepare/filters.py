"""Articles that are no text to learn from: lists, and pages of links.

Public: `KINDS`, `reason`. By the titles, as ORQA left them out (Lee et al.
2019, `preprocess_wiki_extractor`): "List of ...", "Index of ...",
"Outline of ...", "(disambiguation)". Most pages that tell meanings apart have
no such title, so their text is looked at, too.
"""

from collections.abc import Collection
import re

_TITLES = {
    'lists': re.compile(r'Lists? of .'),
    'indices': re.compile(r'(?:Index|Indices) of .'),
    'outlines': re.compile(r'Outline of .'),
    'disambiguation': re.compile(r'.*\(disambiguation\)'),
}
KINDS = tuple(_TITLES)

# 'Mercury may refer to:', 'Mercury may also refer to the following:'.
_REFERS = re.compile(
    r'[^\n.]{1,150}\b(?:may|can|could|might)(?: also| variously)?'
    r' (?:refer to|mean|stand for|be)(?: the following| any of the following'
    r'| one of the following| several things)?(?: (?:\w+ ){1,3})?:\s*(?:\n|$)'
)
_TEMPLATE = re.compile(
    r'\{\{\s*(?:disambig\w*|dab|hndis|geodis|(?:\w+ )*disambiguation)'
    r'(?: page)?\s*[|}]',
    re.IGNORECASE,
)


def reason(
    title: str, text: str, exclude: Collection[str], wikitext: bool = False
) -> str | None:
  """Returns which of the kinds to exclude a record is; None: of none."""
  for kind in KINDS:
    if kind in exclude and _TITLES[kind].match(title):
      return kind
  if 'disambiguation' in exclude and (
      _REFERS.match(text.lstrip())
      or (wikitext and _TEMPLATE.search(text) is not None)
  ):
    return 'disambiguation'
  return None
