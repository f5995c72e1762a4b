"""Leaves of the report by themselves: BibTeX, the words about ε, the numbers at the top, strips of iterates."""

import re

import pytest
import torch

from qleak.report import citations, epsilons, filmstrips, headline

# --- citations ------------------------------------------------------------------------------------

PARTS = {  # a plan that rests on it, and what its entry says
    "zhu2019deep": ({"attacks": ["x()"]}, "Zhu and Liu and Han", "Deep Leakage from Gradients", "NeurIPS"),
    "zhao2020idlg": ({}, "Zhao and Mopuri and Bilen", "iDLG: Improved Deep Leakage from Gradients", None),
    "geiping2020inverting": (
        {"model": "convnet64()"}, "Geiping and Bauermeister and Dröge and Moeller",
        "Inverting Gradients: How easy is it to break privacy in federated learning?", "NeurIPS",
    ),
    "abadi2016deep": (
        {"channels": ["chain(clip_l2(bound=1.0), gaussian(sigma=1.0))"]},
        "Abadi and Chu and Goodfellow and McMahan and Mironov and Talwar and Zhang",
        "Deep Learning with Differential Privacy", "CCS",
    ),
    "wang2021datalens": (
        {"channels": ["chain(klevel())"]}, "Wang and Wu and Long and Rimanic and Zhang and Li",
        "DataLens: Scalable Privacy Preserving Training via Gradient Compression and Aggregation", "CCS",
    ),
    "alistarh2017qsgd": (
        {"channels": ["chain(qsgd())"]}, "Alistarh and Grubic and Li and Tomioka and Vojnovic",
        "QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding", "NeurIPS",
    ),
    "wen2017terngrad": (
        {"channels": ["chain(terngrad())"]}, "Wen and Xu and Yan and Wu and Wang and Chen and Li",
        "TernGrad: Ternary Gradients to Reduce Communication in Distributed Deep Learning", "NeurIPS",
    ),
    "vogels2019powersgd": (
        {"channels": ["chain(powersgd())"]}, "Vogels and Karimireddy and Jaggi",
        "PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization", "NeurIPS",
    ),
}  # fmt: skip
SAID = ["Zhu, Liu, Han. Deep Leakage from Gradients. NeurIPS 2019.",
        "Zhao, Mopuri, Bilen. iDLG: Improved Deep Leakage from Gradients. 2020."]  # fmt: skip


def parsed(entry):
    """Key and fields of a BibTeX entry, by counting braces."""
    kind, key, body = re.fullmatch(r"@(\w+)\{([a-z0-9]+),\n(.*)\n\}", entry, re.S).groups()
    fields = dict(re.fullmatch(r"  (\w+) = \{(.*)\},?", line).groups() for line in body.split("\n"))
    for value in (entry, *fields.values()):
        depth = 0
        for brace in re.findall(r"(?<!\\)[{}]", value):
            depth += 1 if brace == "{" else -1
            assert depth >= 0
        assert depth == 0
    return kind, key, fields


@pytest.mark.parametrize("key", PARTS)
def test_the_main_papers_are_cited_whole(key):
    plan, authors, title, venue = PARTS[key]
    entries = [parsed(e) for e in citations.entries(citations.papers({"papers": SAID, "plan": plan}))]
    kind, _, fields = next(e for e in entries if e[1] == key)
    assert (fields["author"], fields["title"]) == (authors, f"{{{title}}}") and fields["year"] in key
    assert (kind, fields.get("booktitle")) == (("misc", None) if venue is None else ("inproceedings", venue))
    if venue is None:
        assert fields["note"] == "arXiv:2001.02610"


def test_every_part_of_the_package_has_valid_entries_with_keys_of_their_own():
    from qleak.catalog import catalog

    rooms = zip(citations.FIELDS[:3], ("channels", "attacks", "clients"), strict=True)
    plan = {field: [f"{name}()" for name in catalog(room)] for field, room in rooms}
    papers = citations.papers({"plan": plan | {"model": " ".join(f"{n}()" for n in catalog("models"))}})
    keys = [parsed(entry)[1] for entry in citations.entries(papers)]
    assert len(keys) > 20 and len(set(keys)) == len(keys)
    assert keys.count("geiping2020inverting") == 1  # named by three parts, with and without the venue


def test_papers_that_share_a_key_are_told_apart_and_signs_are_escaped():
    one, two = (citations.read(f"Doe, Roe. Deep {t}. ICML 2020.") for t in ("R&D at 100%", "{Nets}_x"))
    first, second = map(parsed, citations.entries([one, two]))
    assert (first[1], second[1]) == ("doe2020deep", "doe2020deepb")
    assert first[2]["title"] == r"{Deep R\&D at 100\%}" and second[2]["title"] == r"{Deep Nets\_x}"


def test_what_no_pattern_knows_is_kept_as_it_is():
    kind, key, fields = parsed(citations.bibtex(citations.read("a note from 1999")))
    assert (kind, key, fields) == ("misc", "1999note", {"title": "{a note from 1999}", "year": "1999"})


# --- the ledger of ε ------------------------------------------------------------------------------


def header(epsilon, kind="audit", **more):
    fact = {"channel": "c", "epsilon": epsilon} | more
    return {"kind": kind, "plan": {"delta": 1e-5}, "facts": [fact], "summary": []}


@pytest.mark.parametrize(
    ("epsilon", "says"),
    [(0.5, "strong guarantee"), (1.0, "strong guarantee"), (1.01, "reasonable guarantee"), (10.0, "reasonable guarantee"),
     (10.1, "weak or no guarantee")],
)  # fmt: skip
def test_the_words_are_those_of_the_guide_and_are_said_to_be(epsilon, says):
    table = epsilons.table({"": header(epsilon)})
    assert table["rows"][0]["cells"] == [f"{epsilon:.3g}", "1", f"{epsilon:.3g}", "1e-05", says]
    assert "Ponomareva et al. 2023" in table["note"] and "that guide's" in table["note"]


def test_a_training_counts_its_messages_and_a_claim_is_no_guarantee():
    trained = header(0.2, "training") | {"summary": [{"channel": "c", "epsilon": 4.0, "rounds": 90}]}
    assert epsilons.rows({"p": trained})[0]["cells"] == ["0.2", "90", "4", "1e-05", "reasonable guarantee"]
    claimed = header(None, "training") | {
        "summary": [{"channel": "c", "epsilon": None, "rounds": 9, "claimed_epsilon": 0.5}]
    }
    assert epsilons.rows({"p": claimed})[0]["cells"][-1] == "0.5 is claimed in print: no guarantee"
    assert epsilons.rows({"p": header(None, nominal_epsilon=1.0)})[0]["cells"][-1] == "1 is a label: no guarantee"


def test_without_any_epsilon_that_is_said_and_without_channels_nothing():
    assert epsilons.table({"": header(None)}) == {"heads": epsilons.HEADS, "rows": [], "note": epsilons.NONE}
    assert epsilons.table({"": {"kind": "audit"}}) == {}


# --- the top of a page ----------------------------------------------------------------------------


def test_a_verdict_falls_into_clauses():
    assert headline.clauses("Verdict: a; b; c. An end of its own.") == ("a", ["b", "c", "An end of its own."])
    assert headline.clauses("Verdict: on the front: a; b.", lead_is_title=True) == ("on the front:", ["a", "b."])


def test_the_tag_says_whether_images_were_rebuilt():
    found = {"channel": "c", "attack": "a()", "control": "none", "recovered": 1}
    assert headline.tag({"kind": "audit", "summary": [found]}) == ("leak", "Images were rebuilt")
    assert headline.tag({"kind": "audit", "summary": [found | {"recovered": 0}]}) == ("held", "No image was rebuilt")
    assert headline.tag({"kind": "captured", "summary": [{"rebuilt": 0}]})[0] == "held"
    assert headline.tag({"kind": "training", "summary": [{}]}) == ("", "") and headline.tag({})[0] == "none"


def test_the_audit_s_numbers_are_the_strongest_ones():
    def arm(channel, recovered, best, control="none", epsilon=None):
        return {"channel": channel, "attack": "dlg()", "control": control, "recovered": recovered, "images": 4,
                "psnr_selected": best, "psnr_selected_max": best + 1, "epsilon": epsilon}  # fmt: skip

    summary = [
        arm("fp32", 4, 50.0),
        arm("q", 2, 22.0, epsilon=3.0),
        arm("q", 0, 9.5, "prior-only"),
        arm("n", 0, 7.0, epsilon=0.5),
    ]
    tiles = {t.name: t for t in headline.audit({"kind": "audit", "plan": {"success": 20.0}, "summary": summary})}
    assert tiles["Images rebuilt"][1:] == ("2 of 4", "dlg on q")  # a coded channel says more than the exact gradient
    assert tiles["Channels that leak"].value == "2 of 3" and tiles["Best picture"].value == "51.0 dB"
    assert tiles["Strongest control"].value == "9.5 dB" and tiles["Smallest ε"].value == "0.5"


def test_trainings_and_frontiers_name_best_and_worst():
    def trained(channel, accuracy):
        return {"channel": channel, "test_accuracy": accuracy, "n": 3, "epoch": 5}

    tiles = headline.training(
        {"summary": [trained("fp32", 0.9), trained("a", 0.5), trained("b", 0.8), trained("gone", None)]}
    )
    assert [(t.value, t.note) for t in tiles] == [
        ("90.0%", "fp32"),
        ("80.0%", "b"),
        ("50.0%", "a"),
        ("3", "5 epochs each"),
    ]
    assert headline.training({"summary": []}) == headline.frontier([]) == headline.audit({}) == []


# --- strips ---------------------------------------------------------------------------------------


def test_a_strip_spreads_its_frames_and_keeps_both_ends(monkeypatch):
    from qleak.report import film

    at = torch.arange(0, 250, 10)
    shown = film.Film(**dict.fromkeys(film.Film._fields) | {
        "image": 3, "at": at, "x": torch.zeros(25, 1, 4, 4), "loss": 1.0 / (1 + at), "psnr": 0.1 * at.float(),
    })  # fmt: skip

    class Run:
        originals = {3: torch.ones(1, 4, 4)}  # noqa: RUF012

        def arms(self):
            return [("c", "a"), ("c", "without film")]

    monkeypatch.setattr(film, "films", lambda run: {("c", "a", 3): shown, ("c", "a", 4): None})
    (strip,) = filmstrips.strips(Run())
    assert strip["title"] == "c · a" and len(strip["frames"]) == filmstrips.FRAMES
    assert [strip["frames"][i]["at"] for i in (0, -1)] == ["0", "240"] and strip["frames"][-1]["psnr"] == "24.0 dB"
    assert strip["frames"][0]["alt"] == "c · a after 0 closures: PSNR 0.0 dB, own loss 1"
    Run.originals = {}
    assert filmstrips.strips(Run()) == []
