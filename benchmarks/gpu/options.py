"""Every option that only a GPU takes once through ``llmtrain train``, doubtful ones first.

Several cases run beside one another: their speed says nothing.  Status, loss and peak memory do.
"""

from benchmarks.gpu.case import Case, Setup, train

COMMON = ("data=python_docs", "loop.eval_every=0", "loop.sample_every=0", "metrics.log_every=2", "schedule=constant",
          "checkpoint.every_steps=0", "loop.max_steps=12", "runtime.num_threads=2")  # fmt: skip
GPT = ("model=gpt124m", "accumulation.batch_size=8", "accumulation.micro_batch_size=8")
LLAMA = ("model=smollm2_135m", "model.vocab_size=null", "tokenizer=gpt2", "data.sequence_length=1024",
         "accumulation.batch_size=8", "accumulation.micro_batch_size=8")  # fmt: skip
SMALL = ("model=tiny", "tokenizer=byte", "data.sequence_length=64", "accumulation.batch_size=4",
         "accumulation.micro_batch_size=4", "loop.max_steps=6", "runtime.num_threads=1")  # fmt: skip
SMALL_LLAMA = ("model=llama_tiny", *SMALL[1:])

# name: overrides of GPT, or of LLAMA where the name begins with llama.  What the CPU refuses needs a GPU, see below.
CASES = {
    # never run anywhere yet
    "graphs, 2 micro-batches": "runtime.compile=true runtime.cuda_graphs=true accumulation.micro_batch_size=4",
    "graphs": "runtime.compile=true runtime.cuda_graphs=true",
    "graphs, evaluation": "runtime.compile=true runtime.cuda_graphs=true loop.eval_every=6 loop.eval_batches=2",
    "graphs, fp8": "runtime.compile=true runtime.cuda_graphs=true precision=fp8",
    "graphs, full checkpointing": "runtime.compile=true runtime.cuda_graphs=true activation_checkpointing=full",
    "llama window, flex": "model.sliding_window=256",
    "llama window, flex, compiled": "model.sliding_window=256 runtime.compile=true",
    "fp8": "precision=fp8",
    "fp8, compiled": "precision=fp8 runtime.compile=true",
    "fp8 by rows, compiled": "precision=fp8 precision.recipe=rowwise runtime.compile=true",
    "fp8, compiled, full checkpointing": "precision=fp8 runtime.compile=true activation_checkpointing=full",
    "offload": "activation_checkpointing=full activation_checkpointing.offload=true",
    "offload, compiled": "activation_checkpointing=full activation_checkpointing.offload=true runtime.compile=true",
    "offload, selective": "activation_checkpointing=selective activation_checkpointing.offload=true",
    "deterministic": "runtime.deterministic=true loop.eval_every=6 loop.eval_batches=2 loop.sample_every=6",
    "deterministic, compiled": "runtime.deterministic=true runtime.compile=true",
    "checkpoints beside training": "checkpoint.every_steps=3 loop.eval_every=6 loop.eval_batches=2 loop.sample_every=6",
    "fp16": "precision=fp16",
    "fp16, recovery off": "precision=fp16 recovery=off",
    "adamw_8bit": "optimizer=adamw_8bit",
    "adamw_8bit, compiled": "optimizer=adamw_8bit runtime.compile=true",
    "adamw_bf16": "optimizer=adamw_bf16",
    "adamw_bf16, compiled": "optimizer=adamw_bf16 runtime.compile=true",
    "muon": "optimizer=muon",
    "adafactor": "optimizer=adafactor",
    # the rest of the groups
    "plain": "", "2 micro-batches": "accumulation.micro_batch_size=4",
    "compiled": "runtime.compile=true",
    "compiled, 2 micro-batches": "runtime.compile=true accumulation.micro_batch_size=4",
    "compiled, dropout": "runtime.compile=true model.dropout=0.1",
    "dropout": "model.dropout=0.1",
    "fp32": "precision=fp32", "tf32": "precision=tf32", "bf16": "precision=bf16",
    "sgd": "optimizer=sgd", "lion": "optimizer=lion", "adam": "optimizer=adam",
    "clipping none": "clipping=none", "clipping value": "clipping=value",
    "clipping per parameter": "clipping=per_parameter", "clipping adaptive": "clipping=adaptive",
    "recovery off": "recovery=off",
    "full checkpointing": "activation_checkpointing=full",
    "full checkpointing, compiled": "activation_checkpointing=full runtime.compile=true",
    "selective checkpointing": "activation_checkpointing=selective",
    "selective checkpointing, compiled": "activation_checkpointing=selective runtime.compile=true",
    "ramp": "accumulation=ramp accumulation.stages=[{start:0,batch_size:4},{start:6,batch_size:8}]",
    "llama": "", "llama, compiled": "runtime.compile=true",
    "llama, selective checkpointing, compiled": "activation_checkpointing=selective runtime.compile=true",
    "profile": "runtime.profile=true loop.max_steps=10",
    "profile, compiled": "runtime.profile=true runtime.compile=true loop.max_steps=10",
}  # fmt: skip
# what a CPU refuses or takes minutes for
GPU_ONLY = ("cuda_graphs=true", "precision=fp8", "offload=true", "compile=true", "precision=fp16", "precision=tf32")


def cases(setup: Setup) -> list[Case]:
    """One that fills the cache of data, alone; then all, then those that take the whole GPU."""
    gpt, llama = (SMALL, SMALL_LLAMA) if setup.rehearses else (GPT, LLAMA)
    made = [train("data and first step", *COMMON, *gpt, "loop.max_steps=2", needs_gpu=False)]
    for name, text in CASES.items():
        sizes = llama if name.startswith("llama") else gpt
        if "accumulation=ramp" in text:
            sizes = tuple(one for one in sizes if not one.startswith("accumulation.batch_size"))
        more = [small(one) for one in text.split()] if setup.rehearses else text.split()
        needs_gpu = any(key in text for key in GPU_ONLY)
        limit = 150 if "compile=true" in text else 75
        made.append(train(name, *COMMON, *sizes, *more, seconds=limit, needs_gpu=needs_gpu, alone=False,
                          environment={"TORCHINDUCTOR_COMPILE_THREADS": "4"}))  # fmt: skip
    return made


def small(override: str) -> str:
    """The override at the sizes of a rehearsal."""
    return {"model.sliding_window=256": "model.sliding_window=16", "accumulation.micro_batch_size=8":
            "accumulation.micro_batch_size=4", "accumulation.micro_batch_size=4": "accumulation.micro_batch_size=2",
            }.get(override, override)  # fmt: skip
