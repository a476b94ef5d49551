"""Stop-gap tangler; the real one replaces it."""
import re, sys, pathlib
root = pathlib.Path(__file__).resolve().parent.parent
files, chunks, owner = {}, {}, {}
for ch in sorted((root / "book").rglob("*.md")):
    text = ch.read_text()
    for mt in re.finditer(r"^(?P<f>`{3,})python \{#(?P<id>[\w-]+)(?: file=\"(?P<file>[^\"]+)\")?\}\n(?P<body>.*?)^(?P=f)[ ]*$", text, re.S | re.M):
        i, f, b = mt["id"], mt["file"], mt["body"]
        if f: owner[i] = f
        chunks.setdefault(i, []).append(b)
slug = lambda s: re.sub(r"[^a-z0-9]+", "-", s.lower()).strip("-")
def expand(body):
    out = []
    for line in body.splitlines(keepends=True):
        mt = re.match(r"^(\s*)# <<(.+)>>\s*$", line)
        if mt:
            out.append(f"{mt[1]}# {mt[2]}\n")
            sub = expand("".join(chunks[slug(mt[2])]))
            out += [(mt[1] + l if l.strip() else l) for l in sub.splitlines(keepends=True)]
        else: out.append(line)
    return "".join(out)
for i, f in owner.items():
    p = root / f; p.parent.mkdir(parents=True, exist_ok=True)
    new = "\n\n".join(expand(b).strip("\n") for b in chunks[i]) + "\n"
    if not p.exists() or p.read_text() != new: p.write_text(new); print("wrote", f)
