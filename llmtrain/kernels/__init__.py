"""Operations that are faster than torch's own, each with a fallback."""
