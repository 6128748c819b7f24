"""Search among images by their vectors: nearest neighbours, their measures, and a kept index."""

from timm_fisher.retrieval.metrics import evaluate_retrieval
from timm_fisher.retrieval.search import nearest_neighbours

__all__ = ['evaluate_retrieval', 'nearest_neighbours']
