"""Label new text with the adapters of this folder. It needs torch, peft and transformers alone.

    python predict.py films '{"text": "a lovely film"}' --base owner/name     # a hub id, or a folder with the base
    python predict.py films '{"text": "a lovely film"}' --merged              # one adapter: one pass, the same to first order

From Python: `Exported(folder, base).predict("films", {"text": "a lovely film"})`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

_FIELD = re.compile(r"\{([^\W\d]\w*)\}")
# What chat templates take for today's date, from a variable or a function, was the same in training.
DATE = "01 Jan 2025"
NO_CLOCK = f"{{% macro strftime_now(format) %}}{DATE}{{% endmacro %}}{{{{ '' }}}}"


class Exported:
    """The adapters of an exported folder on their base."""

    def __init__(self, folder: str | Path, base: str | None = None) -> None:
        self.folder = Path(folder)
        self.described = json.loads((self.folder / "tasks.json").read_text(encoding="utf-8"))
        self.tasks = {task["name"]: task for task in self.described["tasks"]}
        self.ensemble = json.loads((self.folder / "ensemble.json").read_text(encoding="utf-8"))
        base = base or self.described["base"]["source"]
        options: dict[str, Any] = {"dtype": torch.bfloat16 if torch.cuda.is_available() else torch.float32}
        if self.described["base"]["quantization"] == "nf4":
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=options["dtype"],
            )
        self.tokenizer: Any = AutoTokenizer.from_pretrained(base)
        self._end = self._appended()
        model = AutoModelForCausalLM.from_pretrained(base, **options)
        self.names: dict[str, str] = {}
        first = f"adapters/{self.ensemble['adapters'][0]}"
        self.model = PeftModel.from_pretrained(model, self.folder / first, adapter_name=self._name(first)).eval()
        if torch.cuda.is_available():
            self.model.to("cuda")

    def predict(self, task: str, fields: Mapping[str, Any], merged: bool = False) -> dict[str, float]:
        """Probabilities of the label words of `task`, by its ensemble or by its merged adapter."""
        scale = self.ensemble.get("scales", {}).get(task, 1.0)
        if merged:
            total = scale * self._scores(f"merged/{task}", task, fields)
        else:
            weights = zip(self.ensemble["adapters"], self.ensemble["weights"][task], strict=True)
            folders = [("start" if name == "start" else f"adapters/{name}", w) for name, w in weights]
            parts = [scale * w * self._scores(folder, task, fields) for folder, w in folders if w]
            boosting = self.ensemble["boosting"]
            for booster in boosting.get("boosters", {}).get(task, []):
                start = "start" if (self.folder / "start").is_dir() else None
                added = self._scores(f"boosters/{booster}", task, fields) - self._scores(start, task, fields)
                parts.append(boosting["step_sizes"][task] * added)
            total = torch.stack(parts).sum(0)
        return dict(zip(self.tasks[task]["labels"], total.softmax(0).tolist(), strict=True))

    @torch.no_grad()
    def _scores(self, adapter: str | None, task: str, fields: Mapping[str, Any]) -> torch.Tensor:
        """Log-shares (K) of the label words under the adapter at a path of the folder, or under the base alone."""
        words = [self.tokenizer(f" {w}", add_special_tokens=False)["input_ids"] for w in self.tasks[task]["labels"]]
        prompt = self._prompt(self.tasks[task]["prompt"], fields, self.described["max_tokens"] - max(map(len, words)))
        found = []
        for word in words:
            ids = torch.tensor([prompt + word], device=self.model.device)
            if adapter is None:
                with self.model.disable_adapter():
                    logits = self.model(input_ids=ids).logits
            else:
                self._activate(adapter)
                logits = self.model(input_ids=ids).logits
            shares = logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
            found.append(shares[range(len(word)), word].sum())
        return torch.stack(found).log_softmax(0)

    def _prompt(self, template: str, fields: Mapping[str, Any], most: int) -> list[int]:
        """At most `most` tokens, as in training: of a longer prompt the longest fields lose their ends."""
        texts = {name: str(fields[name]) for name in _FIELD.findall(template)}
        fits, fails = 0, max(map(len, texts.values()), default=0)
        whole, best = self._encoded(template, texts, fails), self._encoded(template, texts, 0)
        if len(whole) <= most:
            return whole
        if len(best) > most:
            raise ValueError(f"the prompt without its fields has {len(best)} tokens, and there is room for {most}")
        while fails - fits > 1:
            middle = (fits + fails) // 2
            found = self._encoded(template, texts, middle)
            if len(found) <= most:
                fits, best = middle, found
            else:
                fails = middle
        return best

    def _encoded(self, template: str, texts: Mapping[str, str], cap: int) -> list[int]:
        text = _FIELD.sub(lambda match: texts[match[1]][:cap], template)
        if self.described["chat"]:
            chat = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}],
                chat_template=NO_CLOCK + self.tokenizer.get_chat_template(),
                tokenize=False,
                add_generation_prompt=True,
                date_string=DATE,
            )
            return list(self.tokenizer(chat, add_special_tokens=False)["input_ids"])
        ids = list(self.tokenizer(text)["input_ids"])
        return ids[: len(ids) - self._end]

    def _appended(self) -> int:
        """How many tokens, such as an end, the tokenizer appends; a label follows its prompt at once."""
        bare, full = (self.tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
        starts = [i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare]
        return len(full) - starts[-1] - len(bare) if starts else 0

    def _activate(self, adapter: str) -> None:
        if adapter not in self.names:
            self.model.load_adapter(self.folder / adapter, adapter_name=self._name(adapter))
            self.model.eval()
        self.model.set_adapter(self.names[adapter])

    def _name(self, adapter: str) -> str:
        """A name that torch takes for a module, which may hold no dot."""
        return self.names.setdefault(adapter, f"adapter-{len(self.names)}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Label new text with the adapters of this folder.")
    parser.add_argument("task")
    parser.add_argument("fields", type=json.loads, help="the fields of the prompt as JSON")
    parser.add_argument("--base", default=None, help="the base model: a hub id or a folder (default: as in tasks.json)")
    parser.add_argument("--merged", action="store_true", help="by the dataset's merged adapter")
    options = parser.parse_args()
    exported = Exported(Path(__file__).parent, options.base)
    print(json.dumps(exported.predict(options.task, options.fields, options.merged), ensure_ascii=False))


if __name__ == "__main__":
    main()
