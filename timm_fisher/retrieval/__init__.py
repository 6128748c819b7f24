"""Search by vectors of images: nearest neighbours, their metrics, and an index on disk."""

from timm_fisher.retrieval.index import Index, load_index, update_index
from timm_fisher.retrieval.metrics import evaluate_retrieval
from timm_fisher.retrieval.search import Search

__all__ = ['Index', 'Search', 'evaluate_retrieval', 'load_index', 'update_index']
