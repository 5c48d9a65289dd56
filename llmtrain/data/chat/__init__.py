"""Conversations as text: chat templates."""
