"""One file per engine, each imported only when its runtime is asked for."""
