"""`python -m dpoctl`, and what launchers start: `accelerate launch -m dpoctl dpo recipe.yaml`."""

from dpoctl.cli.app import main

if __name__ == "__main__":
    main()
