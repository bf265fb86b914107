"""Records as earlier versions wrote them: what becomes of them, and of their keys."""
