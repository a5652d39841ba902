"""Stateful server objects that move live between node processes."""
