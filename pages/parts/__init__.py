"""Parts that several pages lay out: progress, figures, the cut picker, help texts, navigation."""
