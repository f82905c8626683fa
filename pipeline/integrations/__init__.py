"""Experts as other libraries want them: `langchain`, `llamaindex` and `gradio`, each an extra, none imported here."""
