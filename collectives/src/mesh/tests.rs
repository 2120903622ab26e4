//! Hosts as threads of this process, connected over the loopback.

use std::net::TcpListener;

use super::*;
use crate::sums::Sums;

/// Floats of many segments.
const MANY: usize = 1 << 20;

/// A mesh for each of `hosts` hosts.
fn meshes(hosts: usize) -> Vec<Mesh> {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut ways: Vec<Vec<Option<Way>>> = Vec::new();
    let line = || {
        let one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (one, listener.accept().unwrap().0)
    };
    for one in 0..hosts {
        let mut own: Vec<_> = (0..hosts).map(|_| None).collect();
        for (other, row) in ways.iter_mut().enumerate() {
            let (data, side) = (line(), line());
            own[other] = Some(Way { rank: other, data: data.0, side: side.0 });
            row[one] = Some(Way { rank: one, data: data.1, side: side.1 });
        }
        ways.push(own);
    }
    let meshes = ways.into_iter().enumerate();
    meshes.map(|(host, ways)| Mesh::new(host, host, ways).unwrap()).collect()
}

fn label(seq: u64) -> Label {
    Label { generation: 1, seq, kind: 3, length: 0 }
}

fn wait(label: Label, deadline: Duration, watch: &dyn Fn() -> Result<()>) -> Wait<'_> {
    let describe = &|theirs: Label| format!("number {}", theirs.seq);
    Wait { label, op: "a sum".to_owned(), start: Instant::now(), deadline, watch, describe }
}

/// One sum over hosts from begin to end.
fn all_reduce(mesh: &mut Mesh, values: &mut [f32], order: Order, wait: &Wait<'_>) -> Result<()> {
    let mut sum = mesh.begin_sum(values.len(), order, wait.label);
    // In three portions, as a host adds them up.
    for ready in [values.len() / 3, values.len() / 2, values.len()] {
        sum.ready = ready;
        mesh.advance(&mut sum, values, Goal::Nothing, wait)?;
    }
    mesh.advance(&mut sum, values, Goal::End, wait)?;
    mesh.end_sum(sum);
    Ok(())
}

const LONG: Duration = Duration::from_secs(20);

/// Runs `work` on every host at once.
fn on_all<T: Send>(meshes: Vec<Mesh>, work: impl Fn(usize, &mut Mesh) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = meshes
            .into_iter()
            .enumerate()
            .map(|(host, mut mesh)| {
                let work = &work;
                scope.spawn(move || work(host, &mut mesh))
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn values(host: usize, length: usize) -> Vec<f32> {
    (0..length)
        .map(|at| ((at * 31 + host * 17) % 1009) as f32 * 1.1_f32.powi(host as i32 * 5))
        .collect()
}

#[test]
fn every_host_gets_the_sum_in_the_order_of_hosts() {
    for (hosts, lengths) in
        [(2, &[0, 1, 5, MANY, 2 * MANY + 77][..]), (3, &[100, MANY + 1]), (4, &[63, 4097])]
    {
        for &length in lengths {
            for order in [Order::Ranks, Order::Pairs] {
                let expected: Vec<u32> = {
                    let parts: Vec<Vec<f32>> =
                        (0..hosts).map(|host| values(host, length)).collect();
                    (0..length)
                        .map(|at| {
                            let mut sums = Sums::new(order);
                            parts
                                .iter()
                                .enumerate()
                                .for_each(|(h, part)| sums.add(h, &part[at..=at]));
                            sums.finish()[0].to_bits()
                        })
                        .collect()
                };
                let results = on_all(meshes(hosts), |host, mesh| {
                    let mut sum = values(host, length);
                    all_reduce(mesh, &mut sum, order, &wait(label(1), LONG, &|| Ok(()))).unwrap();
                    sum.iter().map(|value| value.to_bits()).collect::<Vec<u32>>()
                });
                for result in results {
                    assert!(result == expected, "{hosts} hosts, {length} floats, {order:?}");
                }
            }
        }
    }
}

#[test]
fn bytes_of_any_length_are_gathered() {
    let results = on_all(meshes(3), |host, mesh| {
        let own = vec![host as u8; host * 700_000];
        mesh.gather(&own, &wait(label(1), LONG, &|| Ok(()))).unwrap()
    });
    for gathered in results {
        for (host, bytes) in gathered.iter().enumerate() {
            assert_eq!(bytes.len(), host * 700_000);
            assert!(bytes.iter().all(|byte| *byte == host as u8));
        }
    }
}

#[test]
fn a_lost_host_and_a_late_one_are_named() {
    let results = on_all(meshes(2), |host, mesh| {
        if host == 1 {
            mesh.close(None);
            return None;
        }
        let error = mesh.gather(b"x", &wait(label(4), LONG, &|| Ok(()))).unwrap_err();
        Some(error.to_string())
    });
    let text = results[0].as_deref().unwrap();
    assert!(text.starts_with("rank 1 is gone before `a sum` number 4: "), "{text}");
    let short = Duration::from_millis(100);
    let results = on_all(meshes(2), |host, mesh| {
        if host == 1 {
            std::thread::sleep(Duration::from_millis(400));
            return None;
        }
        Some(mesh.gather(b"x", &wait(label(4), short, &|| Ok(()))).unwrap_err())
    });
    assert!(
        matches!(&results[0], Some(CollectiveError::Deadline { missing_ranks, .. }) if *missing_ranks == [1])
    );
}

#[test]
fn who_gives_up_tells_who_is_at_fault() {
    let results = on_all(meshes(2), |host, mesh| {
        if host == 1 {
            let (by, reason) = (crate::segment::Author::Rank(1), "rank 5 is gone".to_owned());
            mesh.close(Some(&AbortRecord { by, culprit: Some(5), reason }));
            return None;
        }
        let error = mesh.gather(&[7; 5_000_000], &wait(label(4), LONG, &|| Ok(()))).unwrap_err();
        assert!(matches!(error, CollectiveError::Aborted { culprit: Some(5), .. }), "{error:?}");
        Some(error.to_string())
    });
    assert_eq!(results[0].as_deref(), Some("stopped by rank 1: rank 5 is gone"));
}

#[test]
fn hosts_in_different_collectives_are_told_so() {
    let results = on_all(meshes(2), |host, mesh| {
        let error = mesh.gather(b"x", &wait(label(5 + host as u64), LONG, &|| Ok(())));
        error.unwrap_err().to_string()
    });
    assert!(results.iter().any(|text| text.contains("rank 1 calls `number 6`")), "{results:?}");
}

#[test]
fn a_stop_on_this_host_is_heard_while_waiting() {
    let start = Instant::now();
    let results = on_all(meshes(2), |host, mesh| {
        if host == 1 {
            std::thread::sleep(Duration::from_millis(300));
            return None;
        }
        let stop = || {
            let late = start.elapsed() > Duration::from_millis(50);
            let reason = "the launcher says so".to_owned();
            let by = crate::segment::Author::Launcher;
            if late { Err(CollectiveError::Aborted { by, culprit: None, reason }) } else { Ok(()) }
        };
        let error = mesh.gather(b"x", &wait(label(1), LONG, &stop)).unwrap_err();
        Some((error, start.elapsed()))
    });
    let (error, after) = results[0].as_ref().unwrap();
    assert!(matches!(error, CollectiveError::Aborted { .. }), "{error}");
    assert!(*after < Duration::from_millis(290), "{after:?}");
}
