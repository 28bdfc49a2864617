"""Why a call is computed that was to be predicted, and what helps: pairs of a reason and a remedy. And other notes."""

UNLOCATED = (
    "the timestep is not one of the scheduler's, or not its current one",
    "A cached transformer works only with the scheduler of the pipeline for which the cache was enabled.",
)
REPLACED = (
    "the transformer's forward was replaced",
    "Wrap the forward instead of replacing it, or replace it before the cache is enabled.",
)
SWAPPED = (
    "`pipe.transformer` was replaced while the cache was on",
    "Call `handle.disable()` first, and enable a cache for the new transformer.",
)
SKIPPED = (
    "steps were done without the transformer that has the cache",
    "Do not replace `pipe.transformer` in a run, and call it in each step.",
)
RESTARTED = (
    "the scheduler, its timesteps or what was kept for the run were replaced in the middle of a run",
    "The rest of it is a run of its own, which begins with computed steps. Keep the scheduler as it is in a run.",
)
CHANGED = (
    "what wraps the transformer's forward changed the shape of its inputs",
    "Give the forward the inputs that the transformer gets.",
)
ELSEWHERE = (
    "the transformer's forward went another way than in the computed steps",
    "Without an adapter, the forward must call its blocks in the same way in each step.",
)
REPEATED = (
    "the transformer's forward was called more than once in a step",
    "Let what wraps the forward call it once.",
)
DIRECT = (
    "the forward of the transformer was called directly, so lesa did not see the call",
    "Call the transformer itself: `transformer(...)` instead of `transformer.forward(...)`.",
)
UNSEEN = (
    "the output head did not run where lesa sees it",
    "Compile with `pipe.transformer.compile(...)`, and don't replace the transformer's forward.",
)
COMPILE_FIRST = (
    "lesa decides outside of the compiled graph: compile with `pipe.transformer.compile(...)`, or call "
    "`torch.compile(pipe.transformer, fullgraph=True)` before `lesa.enable_cache`"
)
BEGINS = "the first call of this stream"
FIRST_OF_SECOND = "the first step of transformer_2"
UNTOLD = (
    "the levels that the predictor tells the model are not used: this run has other computed steps or noise levels "
    "than its schedule"
)
UNTOLD_TOKENS = (
    "the levels that the predictor tells the model are not used: the transformer does not get one timestep for each "
    "sample"
)
MADE_FOR_OTHER = "this pipeline differs from the one that the predictor was made for"
RISEN = ("the noise level rose", "Pass a list of steps that has this one.")
MOVED = "the features came from another place of the transformer than before, so a new history begins"
UNCLEAR = (
    "the transformer was called twice with the same text in the first step of the run, and once in the second",
    "Call `scheduler.set_timesteps` again after a call that does not belong to the loop, such as one for warm-up.",
)
ALIKE = (
    "calls with the same inputs may belong to different streams",
    "Give each kind of call a name with `transformer.cache_context(...)`, or write an adapter.",
)
