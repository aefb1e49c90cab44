import pytest
import torch
import zoo

import depthpass as dp
from depthpass.analysis.gradients import GradientReport, MatrixGradient, gradients, nuclear_norm
from depthpass.errors import InputError


def labelled(rows=2, tokens=9, prompt=4):
    torch.manual_seed(3)
    ids = torch.randint(3, zoo.VOCABULARY, (rows, tokens))
    labels = ids.clone()
    labels[:, :prompt] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def backward(model, batch):
    """What ``.grad`` holds after a plain backward pass, by parameter name."""
    model.zero_grad()
    model(**batch).loss.backward()
    actual = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return actual


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6), (3, 4, 7)])
def test_nuclear_norm_equals_the_svd(shape):
    torch.manual_seed(0)
    g = torch.randn(shape)
    assert nuclear_norm(g) == pytest.approx(float(torch.linalg.svdvals(g.double()).sum()), rel=1e-10)
    low_rank = torch.randn(8, 2).double() @ torch.randn(2, 8).double()
    assert nuclear_norm(low_rank) == pytest.approx(float(torch.linalg.svdvals(low_rank).sum()), rel=1e-6)
    assert nuclear_norm(torch.zeros(4, 4)) == 0


def test_a_stock_model_gives_the_norms_of_its_gradients():
    model, batch = zoo.model("llama", dtype=torch.float64), labelled()
    grads = backward(model, batch)
    report = gradients(model, batch)
    assert report.blocks == 4 and len(report.layers) == 4 * 7 == len(report.visits)
    assert report.projections == ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                                  "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    for m in report.layers:
        g = grads[f"model.layers.{m.block}.{m.projection}.weight"]
        assert m.shape == tuple(g.shape)
        assert m.nuclear == pytest.approx(float(torch.linalg.svdvals(g).sum()), rel=1e-6)
        assert m.frobenius == pytest.approx(float(g.norm()), rel=1e-12)
    assert report.loss == pytest.approx(float(model(**batch).loss.detach()), rel=1e-12)


def test_the_model_is_left_as_it_was():
    model, batch = zoo.model("llama").train(), labelled()
    model.model.layers[1].self_attn.q_proj.weight.requires_grad_(False)
    parameters = dict(model.named_parameters())
    report = gradients(model, batch)
    assert model.training and model.model.layers[0].training
    assert dict(model.named_parameters()) == parameters
    assert all(p.grad is None for p in parameters.values())
    assert not parameters["model.layers.1.self_attn.q_proj.weight"].requires_grad
    assert "forward" not in vars(model.model.layers[0])
    assert report.profile("self_attn.q_proj")[1] > 0, "frozen parameters are analysed all the same"
    with pytest.raises(RuntimeError, match="stop here"):
        gradients(model, batch, loss=lambda out: (_ for _ in ()).throw(RuntimeError("stop here")))
    assert dict(model.named_parameters()) == parameters and "forward" not in vars(model.model.layers[0])


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_fused_projections_and_experts(name):
    model, batch = zoo.model(name, layers=2), labelled()
    if name == "mixtral":
        model.set_experts_implementation("eager")
    grads = backward(model, batch)
    layers = "transformer.h" if name == "gpt2" else "model.layers"
    report = gradients(model, batch)
    assert len(report.layers) == len(grads_of := [k for k in grads if k.startswith(layers) and grads[k].dim() >= 2])
    assert len(grads_of) == {"gpt2": 2 * 4, "mixtral": 2 * 7}[name]
    for m in report.layers:
        weight = f"{layers}.{m.block}.{m.projection}"
        g = grads[weight if weight in grads else weight + ".weight"]
        assert m.nuclear == pytest.approx(float(torch.linalg.svdvals(g.double()).sum()), rel=1e-5)


def test_mad_and_relative_difference():
    def report(norms, model="M"):
        return GradientReport(model, 1.0, len(norms), tuple(
            MatrixGradient(i, None, "q", (2, 2), v, v / 2) for i, v in enumerate(norms)), ())

    first = report([1.0, 4.0, 2.0, 2.0])
    assert first.mad() == {"q": pytest.approx(5 / 3)}
    assert first.mad(1, 3) == {"q": 2.0} and first.mad(0, 1) == {}
    assert first.mad(value="frobenius") == {"q": pytest.approx(5 / 6)}
    assert first.relative_difference(report([2.0, 4.0, 1.0, 3.0])) == {
        (0, "q"): 1.0, (1, "q"): 0.0, (2, "q"): -0.5, (3, "q"): 0.5}
    with pytest.raises(InputError, match="two reports of the same model"):
        first.relative_difference(report([1.0]))


def test_only_the_response_counts():
    """Labels of -100 leave the prompt out: another loss, other gradients."""
    model, batch = zoo.model("llama"), labelled()
    whole = gradients(model, {**batch, "labels": batch["input_ids"]})
    response = gradients(model, batch)
    assert whole.loss != pytest.approx(response.loss)
    own = gradients(model, {"input_ids": batch["input_ids"]}, loss=lambda out: out.logits.square().mean())
    assert own.loss == pytest.approx(float(
        model(input_ids=batch["input_ids"]).logits.detach().square().mean()))


def test_visits_of_a_looped_program_add_up_to_grad():
    model, batch = zoo.model("llama", dtype=torch.float64), labelled()
    looped = dp.transform(model, dp.LayerProgram([0, 1, 2, 1, 2, 3]))
    grads = backward(looped, batch)
    report = gradients(looped, batch, keep=True)
    names = {"1": 0, "2": 1, "3": 2, "4": 1, "5": 2, "6": 3}
    assert {(m.visit, m.block) for m in report.visits} == set(names.items())
    assert len(report.layers) == 4 * 7 and len(report.visits) == 6 * 7
    for block in range(4):
        visits = [v for v, b in names.items() if b == block]
        for name, parameter in model.model.layers[block].named_parameters():
            if parameter.dim() < 2:
                continue
            want = grads[f"model.layers.{block}.{name}"]
            parts = [report.tensors[v, name] for v in visits]
            torch.testing.assert_close(sum(parts), want, rtol=1e-9, atol=1e-12)
            assert all(p.norm() > 0 for p in parts)
            if len(parts) == 2:
                assert not torch.allclose(parts[0], parts[1])
    for m in report.layers:
        g = grads[f"model.layers.{m.block}.{m.projection}.weight"]
        assert m.nuclear == pytest.approx(float(torch.linalg.svdvals(g).sum()), rel=1e-6)  # rank-deficient


@pytest.mark.parametrize("lowering", ["eager", "auto"])
def test_visits_in_a_token_loop_add_up_over_chunks(lowering):
    """TurboConn's serial region runs a block once per chunk: one visit, one gradient."""
    model, batch = zoo.model("llama", dtype=torch.float64), labelled()
    turbo = dp.transform(model, dp.TurboConn(bridges=((3, 1),), group=2, rank=4), lowering=lowering)
    with torch.no_grad():
        for name, p in turbo.named_parameters():
            if name.startswith("depth."):
                p.normal_(0, 0.1)
    grads = backward(turbo, batch)
    report = gradients(turbo, batch, keep=True, projections=["q_proj", "mlp.down_proj"])
    assert len(report.visits) == 4 * 2
    visits = {o["index"]: o.name for o in turbo.depth_program.visits}
    for block in range(4):
        for name in ("self_attn.q_proj.weight", "mlp.down_proj.weight"):
            torch.testing.assert_close(report.tensors[visits[block], name], grads[f"model.layers.{block}.{name}"],
                                       rtol=1e-9, atol=1e-12)
    assert turbo._depth.lowering == lowering
    after = backward(turbo, batch)
    assert all(torch.equal(after[k], v) for k, v in grads.items()), "the model runs as before"


def test_the_heat_map_shows_every_matrix(tmp_path):
    pytest.importorskip("matplotlib")
    report = gradients(zoo.model("llama", layers=3), labelled())
    figure = report.plot(path=str(tmp_path / "map.png"))
    image = figure.axes[0].images[0].get_array()
    assert image.shape == (3, 7)
    assert image[1][3] == pytest.approx(report.profile("self_attn.o_proj")[1])
    assert (tmp_path / "map.png").stat().st_size > 1000
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()][:2] == ["q_proj", "k_proj"]
    assert report.plot(per_visit=True).axes[0].images[0].get_array().shape == (3, 7)


def test_bad_input_is_explained():
    model, batch = zoo.model("llama", layers=2), labelled()
    with pytest.raises(InputError, match="expected labels in the batch, or loss="):
        gradients(model, {"input_ids": batch["input_ids"]})
    with pytest.raises(InputError, match=r"no block has 'q_prog'\. Did you mean 'q_proj'\?"):
        gradients(model, batch, projections=["q_prog"])
    with pytest.raises(InputError, match="returns a scalar tensor, got"):
        gradients(model, batch, loss=lambda out: out.logits)
    report = gradients(model, batch, projections=["q_proj"])
    with pytest.raises(InputError, match="no projection 'q_proj'"):
        report.profile("q_proj")
    with pytest.raises(InputError, match="expected 'nuclear' or 'frobenius'"):
        report.profile("self_attn.q_proj", "spectral")
    assert report.rows()[0]["projection"] == "self_attn.q_proj"
