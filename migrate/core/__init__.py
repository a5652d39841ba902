"""Decisions: pure state machines. No asyncio, no grpc, no clock, no randomness, no logging."""
