"""What a model might write that would hurt a checker which evaluates, parses without bounds, or searches in squares."""

import random

CANARY = "dam_canary"  # a file of this name appears where code in one of these strings is run

_CODE = [
    f"__import__('pathlib').Path('{CANARY}').touch()",
    f"__import__('os').system('touch {CANARY}')",
    f"open('{CANARY}', 'w').close()",
    f"exec(\"open('{CANARY}', 'w')\")",
    f'eval(\'open("{CANARY}", "w")\')',
    f"[open('{CANARY}', 'w') for _ in (1,)]",
    f"(lambda: open('{CANARY}', 'w'))()",
    f"().__class__.__base__.__subclasses__() or open('{CANARY}', 'w')",
    f'f\'{{open("{CANARY}", "w")}}\'',
    f"(x := open('{CANARY}', 'w'))",
    f"\\write18{{touch {CANARY}}}",
    "exit()",
    "__import__('os')._exit(1)",
    "__import__('os').kill(__import__('os').getpid(), 9)",
    "while True: pass",
    "import os",
]
POWERS = [
    "9**9**9",
    "9**9**9**9",
    "9^{9^{9^{9}}}",
    "9^9^9^9",
    "(9^9)^(9^9)",
    "10**10**10",
    "2**-9**9**9",
    "1<<999999999",
    "999999999!",
    "((9!)!)!",
    "((((9!)!)!)!)!",
    "9e999999999",
    "1e-999999999",
    "0x" + "f" * 300,
    "\\sqrt[9]{9^{9^9}}",
    "\\binom{999999999}{499999999}",
    "\\sum_{n=1}^{10^{10}} n^{n}",
    "\\prod_{n=1}^{999999} n",
    "\\int_0^{\\infty} e^{-x^{x^{x}}} \\sin(x^x) dx",
    "\\lim_{x \\to 0} \\frac{\\sin(x^x)}{x^{x^{x}}}",
    "x^{100000} - 1 = (x-1)^{100000}",
    "(x+y+z+1)^{999}",
    "\\frac{d^{99}}{dx^{99}} \\tan(\\tan(\\tan x))",
    "\\pi^{\\pi^{\\pi^{\\pi}}} \\mod 7",
    "\\gcd(9^{9^9}, 7^{7^7})",
    "\\{" + ",".join(f"x_{{{n}}}" for n in range(60)) + "\\}",
    "[0, 1] \\cup " * 40 + "[2, 3]",
]
_DIGITS = ["١٢٣", "１２３", "१२३", "𝟏𝟐𝟑", "²³", "½", "Ⅻ", "①", "㊿", "𝟗**𝟗**𝟗", "1\u200b2", "1\u202e2", "3٠", "٣+4"]
_SIGNS = ["--5", "+5", "-+-5", "1.2*3", "1_000", "007", "1//2", "5%3", "~5", "1 if 1 else 2"]
_SIGNS += ["2(3)", "(1)(2)", "1,2", "5;6"]
_WORDS = [
    "\x00",
    "\x00" * 50,
    "\ud800",
    "\udfff\ud800",
    "\x1b[2J",
    "\r\r\r",
    "\u2028",
    "\ufeff",
    "\x7f",
    "é" * 40,
    "e\u0301",
]
_OPENERS = [
    "(",
    "[",
    "{",
    "\\{",
    "\\boxed{",
    "\\fbox{",
    "\\frac{",
    "\\sqrt{",
    "<answer>",
    "x_{",
    "2^{",
    "\\left(",
    "-",
    "+",
]
_OPENERS += ["\\begin{pmatrix}", "not ", "lambda:", "1+(", "1/(", "a.", "((", "\\text{", "$", "$$", "\\(", "~"]
_CLOSERS = {"(": ")", "[": "]", "{": "}", "\\{": "\\}", "\\left(": "\\right)", "1+(": ")", "1/(": ")", "((": "))"}
_REPEATED = [
    "1+",
    "1 ",
    "9",
    "1/",
    "1,",
    " ",
    "\n",
    "</answer>",
    "<answer",
    "\\boxed",
    "#### ",
    "\\boxed{}",
    "}",
    "=",
    "1=1",
    "a",
]
_REPEATED += [
    "\\\\",
    "\\",
    "$",
    "-1",
    "1.",
    ".1",
    "0",
    "(1)",
    "1*",
    "\\times",
    "×",
    "\\frac",
    "\\frac{1}{1}",
    "<answer>1</answer>",
]
_AROUND = [
    "{}",
    "<answer>{}</answer>",
    "<answer>\n{}\n</answer>",
    "\\boxed{{{}}}",
    "<answer>\\boxed{{{}}}</answer>",
    "#### {}",
    "<reasoning>{}</reasoning><answer>{}</answer>",
    "the answer is ${}$",
    "<answer>{}",
    "\\boxed{{{}",
    "\\boxed {}",
    "{} = {}",
    "<answer>1</answer>{}",
]
MEGABYTES = 10


def strings(count, seed, *, huge=1000):
    """`count` strings, the same for a seed; one of `huge` is of 10 MB. Some hold what cannot be encoded."""
    generator = random.Random(seed)
    for number in range(count):
        inner = _huge(generator) if number % huge == huge - 1 else _inner(generator)
        around = generator.choice(_AROUND)
        yield around.format(*[inner] * 2)


def _inner(generator):
    kind = generator.randrange(8)
    if kind == 0:
        return generator.choice(_CODE)
    if kind == 1:
        return generator.choice(POWERS)
    if kind == 2:
        return generator.choice(_DIGITS + _SIGNS)
    if kind == 3:
        text = generator.choice(["1+2", "100-93+30", "\\frac{1}{2}", "18", "1 2 3 4"])
        place = generator.randrange(len(text) + 1)
        return text[:place] + generator.choice(_WORDS + _DIGITS + _SIGNS) + text[place:]
    if kind == 4:
        opener, depth = generator.choice(_OPENERS), generator.choice([3, 30, 90, 200, 1000, 5000])
        closers = _CLOSERS.get(opener, "}") * generator.choice([depth, depth, depth - 1, depth + 1, 0])
        return opener * depth + "1" + closers
    if kind == 5:
        return generator.choice("123456789") * generator.choice([10, 40, 300, 5000, 100_000])
    if kind == 6:
        return generator.choice(_REPEATED) * generator.choice([10, 100, 1000, 10_000])
    letters = "0123456789+-*/()^{}\\$=.,_! abcxsqrtfrac<>\n"
    return "".join(generator.choices(letters, k=generator.randrange(200)))


def _huge(generator):
    unit = generator.choice(_REPEATED + _OPENERS + ["9**", "\x00", "\u0663"])
    return unit * (MEGABYTES * 2**20 // len(unit))
