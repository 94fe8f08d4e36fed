"""Who is scored on what: predictions, summaries, the client-by-client matrix, distortion, harm, figures and tables."""
