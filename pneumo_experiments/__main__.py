"""``python -m pneumo_experiments NAME``: the entry points without ``mlflow run``."""

from pneumo_experiments.cli import main

if __name__ == "__main__":
    main()
