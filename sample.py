"""Asks WSI-LLaVA about a slide.

python sample.py --slide S --ask Q     one answer, streamed; S is a slide file, or the name of a prepared slide
python sample.py --slide S             a chat about it
"""

import argparse
import sys
import time
from pathlib import Path

import torch

import wsi_llava
from wsi_llava import UserError

# --------------------------------------------------------------------------------------------------------------------
# Many questions
# --------------------------------------------------------------------------------------------------------------------


def answer_rows(model, tokenizer, rows, visual, max_new_tokens=96, batch=64):
    """Greedy answers to the first question of each row of the dataset, in the rows' order.

    visual: {slide: visual tokens [V,C]}, or None to ask without the slide. Questions of the same length go together, so
    that a batch holds no padding and every answer is what it would be alone.
    """
    prompts = []
    for row in rows:
        question = row["conversations"][0]
        if visual is None:
            question = {**question, "value": question["value"].replace("<image>\n", "")}
        prompts.append(tokenizer.encode_chat([question])[0])
    answers = [None] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(prompts[i]))
    while order:
        group = [i for i in order[:batch] if len(prompts[i]) == len(prompts[order[0]])]
        order = order[len(group) :]
        slides = None if visual is None else torch.stack([visual[rows[i]["slide"]] for i in group]).to(model.device)
        steps = model.generate(slides, [prompts[i] for i in group], max_new_tokens, eos=tokenizer.eos)
        for i, ids in zip(group, zip(*steps)):
            answers[i] = tokenizer.decode([t for t in ids if t is not None and t != tokenizer.eos])
    return answers


def same_answer(answer, truth):
    """Whether two short answers say the same, up to case, spaces and final punctuation."""
    return " ".join(answer.lower().split()).rstrip(".") == " ".join(truth.lower().split()).rstrip(".")


# --------------------------------------------------------------------------------------------------------------------
# One slide
# --------------------------------------------------------------------------------------------------------------------


class Chat:
    """A conversation about one slide: visual tokens [V,C] -> replies. The key-value cache is kept from turn to turn."""

    def __init__(self, model, tokenizer, visual, **options):
        self.model, self.tokenizer, self.visual, self.options = model, tokenizer, visual, options
        like = model.mm_projector[0].weight
        self.cache = wsi_llava.KVCache(model.cfg.llama, 1, model.cfg.llama.context, like.device, like.dtype)
        self.tail = []  # the last reply's tokens that the cache does not hold yet

    def reply(self, question):
        """Yields the answer piece by piece. Raises UserError where the conversation no longer fits the context."""
        if not self.cache.length:
            ids, _ = self.tokenizer.encode_chat([{"from": "human", "value": f"<image>\n{question}"}])
            visual = self.visual[None].to(self.model.device)
        else:
            ids, visual = self.tail + self.tokenizer.encode(f"USER: {question} ASSISTANT:"), None
        answer, shown = [], ""
        for (token,) in self.model.generate(visual, [ids], eos=self.tokenizer.eos, cache=self.cache, **self.options):
            self.tail = [token] if token == self.tokenizer.eos else [token, self.tokenizer.eos]
            if token != self.tokenizer.eos:
                answer.append(token)
            text = self.tokenizer.decode(answer)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half a character waits for its other bytes
                yield text[len(shown) :]
                shown = text


def slide_tokens(args, meta, model):
    """--slide, a file or the name of a prepared slide -> its visual tokens [V,C]; a raw slide is prepared first."""
    path = Path(args.slide)
    if path.is_file():
        import prepare  # here, so that asking about prepared slides needs no OpenSlide

        failures = prepare.prepare_slides(prepare.with_defaults(args), {path.stem: path})
        if failures:
            raise UserError(failures[0][1])
        name = path.stem
    else:
        name = args.slide
        imported = meta["encoder"]["source"] == wsi_llava.IMPORTED_TOKENS
        if imported and (args.data / "visual_tokens" / f"{name}.safetensors").exists():
            return wsi_llava.read_visual_tokens(args.data, name, model.cfg)
        if not (args.data / "features" / f"{name}.safetensors").exists():
            raise UserError(f"--slide {name}: neither a file nor the name of a slide in {args.data}/features")
    if not len(wsi_llava.read_features(args.data, name)[0]):
        raise UserError(f"--slide {name}: no tissue was found on it; look at {args.data}/qc/{name}.jpg")
    wsi_llava.cache_visual_tokens(model, args.data, [name])
    return wsi_llava.read_visual_tokens(args.data, name, model.cfg)


def show(pieces):
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def chat_loop(chat):
    """Reads questions until the end of the input or /quit."""
    talking = sys.stdin.isatty()
    print("Ask about the slide; /quit ends.") if talking else None
    while True:
        try:
            question = input("> " if talking else "").strip()
        except EOFError:
            return
        if question == "/quit":
            return
        if question:
            try:
                show(chat.reply(question))
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--slide", help="a slide file, or the name of a prepared slide")
    add("--ask", help="one question; without it, a chat")
    add("--max-new-tokens", type=int, default=512, help="longest answer (default: 512)")
    add("--temperature", type=float, default=0.0, help="0 (default): the most likely token, always; above: sampled")
    add(
        "--top-p",
        type=float,
        default=1.0,
        help="sample from the smallest set of tokens of this probability (default: 1)",
    )
    add("--top-k", type=int, default=0, help="sample from the k most likely tokens (default: 0, all)")
    add("--mpp", type=float, help="um per pixel at level 0, for a raw slide whose metadata lack it")
    wsi_llava.add_shared_flags(parser)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    if not args.slide:
        raise UserError("nothing to ask about: give --slide FILE or the name of a prepared slide (--help explains)")
    wsi_llava.resolve_device(args)
    started = time.time()
    meta = wsi_llava.read_meta(args.data)
    model, tokenizer = wsi_llava.assemble(args, meta, 3)
    model.to(args.device)
    visual = slide_tokens(args, meta, model)
    print(
        f"{args.slide}: {len(visual)} visual tokens; model of {args.out}/stage3 on {args.device}, {time.time() - started:.1f} s."
    )
    options = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "top_p": args.top_p}
    chat = Chat(model, tokenizer, visual, **options, top_k=args.top_k, seed=args.seed)
    if args.ask:
        show(chat.reply(args.ask))
    else:
        chat_loop(chat)


if __name__ == "__main__":
    wsi_llava.run(main)
