"""What compare.sh runs: cases with their targets, each side a process of its own, and a table of the ratios."""
import argparse, json, pathlib, subprocess, sys, time

HERE = pathlib.Path(__file__).resolve().parent
TWO = "--devices cuda:0,cuda:1 --memory-limit 23GiB"

# name: (set, ours, theirs, largest ratio ours / theirs, largest peak of a card in GiB); None where there is none.
# Steps are compared per micro-batch, since the other side's cards never work at once and its time grows with each.
CASES = {
    "14b-49-eager": ("one-card", "step --model t2v-14b --base bf16 --frames 49",
                     "train --model 14b --weights bf16 --frames 49", 0.64, None),
    "14b-49-compiled": ("one-card", "step --model t2v-14b --base bf16 --frames 49",
                        "train --model 14b --weights bf16 --frames 49 --compile", 0.82, None),
    "14b-81-compiled": ("one-card", "step --model t2v-14b --base bf16 --frames 81",
                        "train --model 14b --weights bf16 --frames 81 --compile", 0.80, None),
    "14b-forward": ("one-card", "forward --model t2v-14b --base bf16 --frames 81",
                    "infer --model 14b --weights bf16 --frames 81 --compile", 0.97, None),
    "1.3b-81-compiled": ("small", "step --model t2v-1.3b --base bf16 --frames 81",
                         "train --model 1.3b --weights bf16 --frames 81 --compile", 0.80, None),
    "5b-121-compiled": ("small", "step --model ti2v-5b --base bf16 --frames 121 --height 704 --width 1280",
                        "train --model 5b --weights bf16 --frames 121 --height 704 --width 1280 --compile", 0.80, None),
    "vae-81": ("small", "vae --model wan2.1 --frames 81", "vae --frames 81", 0.66, 4.0),
    "text": ("small", "text --model umt5-xxl", "text", None, None),
    "14b-49-bf16": ("two-cards", f"step --model t2v-14b --base bf16 --frames 49 --accumulate 8 {TWO}",
                    "train --model 14b --gpus 2 --weights bf16 --frames 49", 0.36, 22.0),
    "14b-49-fp8": ("two-cards", f"step --model t2v-14b --base fp8 --frames 49 --accumulate 8 {TWO}",
                   "train --model 14b --gpus 2 --weights fp8 --frames 49", 0.36, 22.0),
    "14b-49-single": ("two-cards", f"step --model t2v-14b --base bf16 --frames 49 {TWO}",
                      "train --model 14b --gpus 2 --weights bf16 --frames 49", 0.64, 22.0),
    "14b-49-staged": ("two-cards", f"step --model t2v-14b --base bf16 --frames 49 --transfer host {TWO}",
                      "train --model 14b --gpus 2 --weights bf16 --frames 49", 0.64, 22.0),
    "14b-81-fp8": ("two-cards", f"step --model t2v-14b --base fp8 --frames 81 {TWO}", None, None, 22.0),
    "14b-720p-fp8": ("two-cards", f"step --model t2v-14b --base fp8 --frames 81 --height 720 --width 1280 {TWO}",
                     None, None, 23.0),
}
ALWAYS = "--random-weights"


def seconds(row):
    """What is compared: seconds of a micro-batch, a forward, a decode or an encode."""
    if "s_per_step" in row:
        return row["s_per_step"] / row["accumulate"]
    return next((row[key] for key in ("s_per_forward", "decode_s", "s") if key in row), None)


def peak(row):
    """The fullest card, in GiB."""
    found = row.get("decode_peak_gib", row.get("peak_gib"))
    return max(found) if isinstance(found, list) and found else found


def rows_of(command, limit):
    """The JSON objects that `command` prints; the last line of its complaints where it fails."""
    start = time.time()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
        said, complaint, code = done.stdout, done.stderr, done.returncode
    except subprocess.TimeoutExpired as late:
        said, complaint, code = late.stdout or b"", f"not done after {limit} s", 1
        said = said.decode() if isinstance(said, bytes) else said
    except OSError as why:
        said, complaint, code = "", str(why), 1
    rows = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    rows = [row for row in rows if seconds(row) is not None]
    if code != 0 or not rows:
        lines = complaint.strip().splitlines() or [f"exit status {code}, and nothing said"]
        rows = [{"error": lines[-1][:400]}]
    return [dict(row, wall_s=round(time.time() - start, 1)) for row in rows]


class Runs:
    """Runs each command once, tells its rows, and keeps them in a file where one is named."""

    def __init__(self, kept, limit):
        self.kept, self.limit, self.rows = kept, limit, {}
        for line in kept.read_text().splitlines() if kept and kept.exists() else []:
            row = json.loads(line)
            if "error" not in row:
                self.rows.setdefault(row["command"], []).append(row)

    def of(self, who, words):
        name = " ".join([who, *words[2 if who == "pytorch" else 1:]])
        if name not in self.rows:
            self.rows[name] = [dict(who=who, command=name, **row) for row in rows_of(words, self.limit)]
            for row in self.rows[name]:
                line = json.dumps(row)
                print(line, flush=True)
                if self.kept:
                    with self.kept.open("a") as out:
                        out.write(line + "\n")
        # One command may tell several engines or dtypes: the fastest speaks for it.
        whole = [row for row in self.rows[name] if "error" not in row]
        return min(whole, key=seconds) if whole else self.rows[name][0]


def verdict(ours, theirs, most, most_gib):
    """(ratio, verdict) of one case."""
    if "error" in ours:
        return None, "ours failed: " + ours["error"]
    is_full = most_gib is not None and (peak(ours) or 0) > most_gib
    if theirs is None:
        return None, f"MISSED: more than {most_gib} GiB" if is_full else "runs"
    if "error" in theirs:
        return None, "theirs failed: " + theirs["error"]
    ratio = seconds(ours) / seconds(theirs)
    if most is not None and ratio > most:
        return ratio, "MISSED"
    return ratio, f"MISSED: more than {most_gib} GiB" if is_full else ("met" if most else "no target")


def table(results):
    head = ["case", "ours s", "theirs s", "ratio", "target", "ours GiB", "theirs GiB", "verdict"]
    number = lambda value, digits: "-" if value is None else f"{value:.{digits}f}"
    lines = [head]
    for name, (_, _, _, most, most_gib), ours, theirs in results:
        ratio, word = verdict(ours, theirs, most, most_gib)
        of_theirs = (lambda f: f(theirs) if theirs else None)
        target = " ".join(filter(None, [most and f"<= {most:.2f}x", most_gib and f"<= {most_gib:.1f} GiB"])) or "-"
        lines.append([name, number(seconds(ours), 3), number(of_theirs(seconds), 3), number(ratio, 3), target,
                      number(peak(ours), 2), number(of_theirs(peak), 2), word])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head) - 1)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)) + "  " + line[-1])


def main():
    ap = argparse.ArgumentParser(description="Tandem and PyTorch in turn on this machine")
    ap.add_argument("tandem", nargs="?", help="the binary")
    ap.add_argument("cases", nargs="*", default=["all"], help="sets or cases; all where none is named")
    ap.add_argument("--list", action="store_true", help="tell sets and cases, run nothing")
    ap.add_argument("--keep", type=pathlib.Path, metavar="FILE",
                    help="add rows to FILE, and take from it what was measured already")
    ap.add_argument("--timeout", type=int, default=420, metavar="S", help="longest run of one side")
    ap.add_argument("-n", type=int, default=2, help="runs that count, behind one that does not")
    a = ap.parse_args()
    if a.list or not a.tandem:
        for name, (group, ours, theirs, *_) in CASES.items():
            print(f"{group:10} {name:18} bench {ours}\n{'':29} {theirs or '-'}")
        return 0 if a.list else 2
    wanted = [name for name, case in CASES.items() if {"all", name, case[0]} & set(a.cases)]
    if not wanted:
        sys.exit(f"no case of {a.cases}; --list tells them")
    runs, results = Runs(a.keep, a.timeout), []
    for name in wanted:
        _, ours, theirs, *_ = CASES[name]
        repeats = ["-n", str(a.n)]
        mine = [a.tandem, "--json", "bench", *ours.split(), ALWAYS, *repeats]
        other = [sys.executable, str(HERE / "torch_peer.py"), *(theirs or "").split(), *repeats]
        row = runs.of("tandem", mine)
        results.append((name, CASES[name], row, runs.of("pytorch", other) if theirs else None))
    print()
    table(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
