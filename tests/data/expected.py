"""`chats.jsonl` as three templates render it, written by hand: what stands in ⟦ ⟧ has loss, and no other token."""

CHATML = [
    "<|im_start|>user\nName a loop.<|im_end|>\n<|im_start|>assistant\n⟦for<|im_end|>⟧\n",
    "<|im_start|>user\nAnd one more?<|im_end|>\n<|im_start|>assistant\n⟦while\nis the other.<|im_end|>⟧\n"
    "<|im_start|>user\nNo third?<|im_end|>\n<|im_start|>assistant\n⟦No.<|im_end|>⟧\n",
    "<|im_start|>user\nSay nothing.<|im_end|>\n<|im_start|>assistant\n⟦<|im_end|>⟧\n"
    "<|im_start|>user\nThanks!<|im_end|>\n<|im_start|>assistant\n⟦(bows)<|im_end|>⟧\n",
    "<|im_start|>user\nSchnee, bitte: ☃<|im_end|>\n<|im_start|>assistant\n⟦☃ 雪 – «Ça va»\t😀<|im_end|>⟧\n",
    "<|im_start|>user\nWhat does <b>yield</b> do?<|im_end|>\n"
    "<|im_start|>assistant\n⟦def f():\n    yield 1\n\nIt hands out a value.<|im_end|>⟧\n"
    "<|im_start|>user\n  Return?  <|im_end|>\n<|im_start|>assistant\n⟦It ends.<|im_end|>⟧\n"
    "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n⟦That's all<|im_end|>⟧\n",
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is a list?<|im_end|>\n"
    "<|im_start|>assistant\n⟦A sequence<|im_end|>⟧\n",
]

USER, ASSISTANT = ("<|start_header_id|>" + role + "<|end_header_id|>\n\n" for role in ("user", "assistant"))
LLAMA3 = [
    "<|begin_of_text|>" + USER + "Name a loop.<|eot_id|>" + ASSISTANT + "⟦for<|eot_id|>⟧",
    "<|begin_of_text|>" + USER + "And one more?<|eot_id|>" + ASSISTANT + "⟦while\nis the other.<|eot_id|>⟧"
    + USER + "No third?<|eot_id|>" + ASSISTANT + "⟦No.<|eot_id|>⟧",
    "<|begin_of_text|>" + USER + "Say nothing.<|eot_id|>" + ASSISTANT + "⟦<|eot_id|>⟧"
    + USER + "Thanks!<|eot_id|>" + ASSISTANT + "⟦(bows)<|eot_id|>⟧",
    "<|begin_of_text|>" + USER + "Schnee, bitte: ☃<|eot_id|>" + ASSISTANT + "⟦☃ 雪 – «Ça va»\t😀<|eot_id|>⟧",
    "<|begin_of_text|>" + USER + "What does <b>yield</b> do?<|eot_id|>"
    + ASSISTANT + "⟦def f():\n    yield 1\n\nIt hands out a value.<|eot_id|>⟧"
    + USER + "Return?<|eot_id|>" + ASSISTANT + "⟦It ends.<|eot_id|>⟧"
    + USER + "And?<|eot_id|>" + ASSISTANT + "⟦That's all<|eot_id|>⟧",
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    + USER + "What is a list?<|eot_id|>" + ASSISTANT + "⟦A sequence<|eot_id|>⟧",
]  # fmt: skip

GEMMA = [  # which refuses the last one
    "<bos><start_of_turn>user\nName a loop.<end_of_turn>\n<start_of_turn>model\n⟦for<end_of_turn>⟧\n",
    "<bos><start_of_turn>user\nAnd one more?<end_of_turn>\n<start_of_turn>model\n⟦while\nis the other.<end_of_turn>⟧\n"
    "<start_of_turn>user\nNo third?<end_of_turn>\n<start_of_turn>model\n⟦No.<end_of_turn>⟧\n",
    "<bos><start_of_turn>user\nSay nothing.<end_of_turn>\n<start_of_turn>model\n⟦<end_of_turn>⟧\n"
    "<start_of_turn>user\nThanks!<end_of_turn>\n<start_of_turn>model\n⟦(bows)<end_of_turn>⟧\n",
    "<bos><start_of_turn>user\nSchnee, bitte: ☃<end_of_turn>\n"
    "<start_of_turn>model\n⟦☃ 雪 – «Ça va»\t😀<end_of_turn>⟧\n",
    "<bos><start_of_turn>user\nWhat does <b>yield</b> do?<end_of_turn>\n"
    "<start_of_turn>model\n⟦def f():\n    yield 1\n\nIt hands out a value.<end_of_turn>⟧\n"
    "<start_of_turn>user\nReturn?<end_of_turn>\n<start_of_turn>model\n⟦It ends.<end_of_turn>⟧\n"
    "<start_of_turn>user\nAnd?<end_of_turn>\n<start_of_turn>model\n⟦That's all<end_of_turn>⟧\n",
]
