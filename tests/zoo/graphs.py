"""Graph networks of PyTorch Geometric, classifying whole graphs, with its own loader."""

import lightning.pytorch as pl
import torch
from torch.nn import functional
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GCN, GIN, MLP, global_add_pool, global_mean_pool

from tests.zoo.data import QUERIES, Items, generator

CHANNELS = 5


class GraphIsomorphism(pl.LightningModule):
    """GIN with a sum over nodes, as in PyTorch Geometric's example with Lightning."""

    def __init__(self):
        super().__init__()
        self.gnn = GIN(CHANNELS, 16, num_layers=2, dropout=0.2, norm="batch_norm")
        self.classifier = MLP([16, 16, 2], norm="batch_norm", dropout=0.2)

    def forward(self, features, edges, batch):
        return self.classifier(global_add_pool(self.gnn(features, edges), batch))

    def training_step(self, data, batch_idx):
        logits = self(data.x, data.edge_index, data.batch)
        loss = functional.cross_entropy(logits, data.y)
        accuracy = (logits.argmax(-1) == data.y).float().mean()
        self.log_dict({"train_loss": loss, "train_accuracy": accuracy}, batch_size=data.num_graphs)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


class GraphConvolution(pl.LightningModule):
    """GCN with a mean over nodes and no norm that joins the graphs of a batch."""

    def __init__(self):
        super().__init__()
        self.gnn = GCN(CHANNELS, 16, num_layers=2, dropout=0.1, act="tanh")
        self.head = torch.nn.Linear(16, 2)

    def training_step(self, data, batch_idx):
        nodes = self.gnn(data.x, data.edge_index)
        loss = functional.cross_entropy(self.head(global_mean_pool(nodes, data.batch)), data.y)
        self.log("train_loss", loss, batch_size=data.num_graphs)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01, weight_decay=5e-4)


def _graphs(first: int, last: int) -> Items:
    """Rings of 5 to 9 nodes, every other one with chords; nodes carry a one-hot colour."""
    stream, items = generator(5), []
    for n in range(last):
        nodes = int(torch.randint(5, 10, (), generator=stream))
        ring = torch.arange(nodes)
        edges = torch.stack([ring, (ring + 1) % nodes])
        if n % 2:
            edges = torch.cat([edges, torch.stack([ring, (ring + 2) % nodes])], dim=1)
        colours = torch.randint(CHANNELS, (nodes,), generator=stream)
        items.append(
            Data(
                x=functional.one_hot(colours, CHANNELS).float(),
                edge_index=torch.cat([edges, edges.flip(0)], dim=1),
                y=torch.tensor([n % 2]),
            )
        )
    return Items(items[first:])


def in_float64(batch):
    """What Lightning's precision leaves as it is."""
    return batch.apply(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)


def gin():
    return GraphIsomorphism(), DataLoader(_graphs(0, 40), batch_size=8, shuffle=True)


def gin_queries():
    return _graphs(40, 40 + QUERIES)


def gcn():
    return GraphConvolution(), DataLoader(_graphs(0, 40), batch_size=8, shuffle=True)


def gcn_queries():
    return _graphs(40, 40 + QUERIES)
