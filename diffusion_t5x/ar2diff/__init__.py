"""Turn your autoregressive model into a diffusion model: import, train, score before and after, export.

MODEL is a model on the Hugging Face Hub (ORG/NAME[@REVISION]), a folder in that format, a GGUF file, a T5X checkpoint,
or a checkpoint of this framework. The command prints its plan, then runs it. Repeat the command to resume after an
interruption. --gin.NAME=VALUE sets a macro or a parameter of the recipe, which is written to DIR/recipe.gin.
"""
