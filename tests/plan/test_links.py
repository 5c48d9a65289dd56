"""Volumes and times of collective operations, by hand."""

import pytest

from llmtrain.plan.links import Links, Network, links_of, scattered_bytes
from llmtrain.plan.mesh import Group, Mesh

LINKS = Links(gpus_per_host=8, host=450e9, network=50e9)


def test_a_rank_receives_the_parts_of_the_others() -> None:
    assert scattered_bytes(800, 8) == 700
    assert scattered_bytes(800, 1) == 0


def test_groups_span_hosts_by_their_stride() -> None:
    mesh = Mesh(replicate=2, shard=8, tensor=4)  # 64 ranks on 8 hosts
    assert LINKS.span(mesh.tensor_group) == (4, 1)
    assert LINKS.span(mesh.shard_group) == (2, 4)
    assert LINKS.span(mesh.replicate_group) == (1, 2)


def test_an_all_gather_within_a_host_takes_its_links() -> None:
    # 7/8 of 3.6 GB at 360 GB/s, and 7 steps of 3.4 µs
    assert LINKS.scatter_seconds(3.6e9, Group(8, 1)) == pytest.approx(0.00875 + 23.8e-6)


def test_an_all_gather_between_hosts_takes_the_adapters_of_all_its_ranks() -> None:
    # 16 ranks on 2 hosts: each host receives half of 7.2 GB through 8 adapters at 45 GB/s; 14 steps within, 1 between
    assert LINKS.scatter_seconds(7.2e9, Group(16, 1)) == pytest.approx(3.6e9 / 360e9 * 15 / 8 + 14 * 3.4e-6 + 14e-6)
    # with 4 ranks between its neighbours a group has 2 adapters a host: 3/4 of 7.2 GB on 4 hosts at 90 GB/s
    assert LINKS.scatter_seconds(7.2e9, Group(8, 4)) == pytest.approx(0.06 + 4 * 3.4e-6 + 3 * 14e-6)
    # and with 8 one: 3/4 of 7.2 GB at 45 GB/s, nothing within a host
    assert LINKS.scatter_seconds(7.2e9, Group(4, 8)) == pytest.approx(0.12 + 3 * 14e-6)


def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather() -> None:
    group = Group(8, 1)
    assert LINKS.reduce_seconds(1e9, group) == 2 * LINKS.scatter_seconds(1e9, group)
    assert LINKS.reduce_seconds(1e9, Group(1, 1)) == 0


def test_stages_on_other_hosts_send_over_the_network() -> None:
    assert LINKS.send_seconds(36e6, Group(2, 4)) == pytest.approx(0.1e-3 + 3.4e-6)
    assert LINKS.send_seconds(45e6, Group(2, 8)) == pytest.approx(1e-3 + 14e-6)


def test_four_gpus_without_a_switch_divide_their_links() -> None:
    links = Links(gpus_per_host=4, host=450e9, network=50e9)
    assert links.host_rate(4) == pytest.approx(360e9)
    assert links.host_rate(2) == pytest.approx(120e9)
    assert LINKS.host_rate(2) == pytest.approx(360e9)


def test_links_are_those_of_the_device_unless_named() -> None:
    assert links_of("h100-80gb", 8, Network.infiniband, None, None) == LINKS
    assert links_of("a100-40gb", 8, Network.roce, None, None) == Links(8, 300e9, 25e9)
    assert links_of("l40s-48gb", 4, Network.ethernet, 20, 100) == Links(4, 20e9, 12.5e9)
