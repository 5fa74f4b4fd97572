"""Chemprop's message passing networks, from SMILES, with its own data set and loader."""

import math

from chemprop import data, featurizers, models, nn

from tests.zoo.data import QUERIES

SMILES = [
    *("C", "CC", "CCC", "CCCC", "CCO", "CCN", "CO", "CN", "C=C", "C#N", "CC=O", "CC(=O)O", "CC(=O)N", "CC(C)C"),
    *("CC(C)O", "C1CC1", "C1CCC1", "C1CCCCC1", "c1ccccc1", "Cc1ccccc1", "Oc1ccccc1", "Nc1ccccc1", "c1ccncc1"),
    *("C1CCOC1", "CCOCC", "CCSCC", "CC(=O)C", "CCCl", "CCBr", "CF", "OCCO", "NCCN", "OCC(O)CO", "CC#C", "C=CC=C"),
    *("c1ccoc1", "c1ccsc1", "CC(C)(C)C", "CCCCO", "CCCCCC"),
]


def _molecules(first: int, last: int) -> data.MoleculeDataset:
    """Molecules with two made-up properties, of which the second is not known for every third."""
    points = []
    for n, smiles in enumerate(SMILES[first:last], first):
        size, polar = len(smiles), sum(smiles.upper().count(atom) for atom in "ON")
        second = math.nan if n % 3 == 2 else 0.5 * size - polar
        points.append(data.MoleculeDatapoint.from_smi(smiles, [math.log(size) + polar, second]))
    return data.MoleculeDataset(points, featurizers.SimpleMoleculeMolGraphFeaturizer())


def _network(batch_norm: bool) -> models.MPNN:
    """Message passing along bonds, means over atoms, and a small predictor, its outputs scaled back as documented."""
    scaler = _molecules(0, 32).normalize_targets()
    return models.MPNN(
        nn.BondMessagePassing(d_h=24, depth=3, dropout=0.1),
        nn.MeanAggregation(),
        nn.RegressionFFN(
            n_tasks=2, input_dim=24, hidden_dim=24, output_transform=nn.UnscaleTransform.from_standard_scaler(scaler)
        ),
        batch_norm=batch_norm,
        warmup_epochs=1,
        max_lr=5e-3,
    )


def _training_molecules() -> data.MoleculeDataset:
    molecules = _molecules(0, 32)
    molecules.normalize_targets()
    return molecules


def in_float64(batch):
    """What Lightning's precision leaves as it is: the features of atoms and bonds."""
    batch.bmg.V, batch.bmg.E = batch.bmg.V.double(), batch.bmg.E.double()
    return batch


def chemprop():
    return _network(batch_norm=False), data.build_dataloader(_training_molecules(), batch_size=8)


def chemprop_queries():
    queries = _molecules(32, 32 + QUERIES)
    queries.normalize_targets(_molecules(0, 32).normalize_targets())
    return queries


def chemprop_batch_norm():
    return _network(batch_norm=True), data.build_dataloader(_training_molecules(), batch_size=8)


def chemprop_batch_norm_queries():
    return chemprop_queries()
