"""Side commands behind `python -m telco_nb`: pilot, batch, votes, rerank, publish; and the estimate for run_all.py."""
