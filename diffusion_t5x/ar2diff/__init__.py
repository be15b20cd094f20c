"""Turn an autoregressive model of yours into a diffusion model: import, train, score before and after, export.

MODEL is a model of Hugging Face's hub (ORG/NAME[@REVISION]), a folder in its format, a GGUF file, a T5X checkpoint, or
a checkpoint of this framework. The command says what it will do, then does it; after an interruption, the same command
goes on. --gin.NAME=VALUE sets a macro or a parameter of the recipe, which is written to DIR/recipe.gin.
"""
