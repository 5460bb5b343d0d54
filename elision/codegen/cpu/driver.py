"""The native side of a run: walking the table, the barrier, and workers that wait for the next run.

Every thread walks the same rows. Waiting spins briefly, then yields (barrier) or sleeps on a futex (workers), so that an
oversubscribed machine slows down but does not collapse.
"""

from __future__ import annotations

import platform

from elision.codegen.cpu.emit import PTR
from elision.ir import schedule as abi

# Words of a pool: the number of the job, sleeping workers, stop, the job's context and first row, the barrier's counter. The
# counter is the pool's, and only grows: a worker may still be on its way out of a run whose context is already gone.
JOB, SLEEPERS, STOP, CONTEXT, START, COUNTER = 0, 8, 16, 24, 25, 32
_SPINS_BARRIER, _SPINS_WORKER = 2000, 20000

#: Linux system calls (futex, sched_yield), by machine; elsewhere libc's functions stand in.
_CALLS = {"x86_64": (202, 24), "aarch64": (98, 124)}
_PAUSE = {
    "x86_64": 'llvm.call_intrinsic "llvm.x86.sse2.pause"() : () -> ()',
    "aarch64": 'llvm.inline_asm has_side_effects "yield", "" : () -> ()',
}


def driver() -> str:
    """MLIR text of ``run(pool, ctx, tid, start) -> row``, ``worker(pool, tid)``, ``launch(pool, ctx, start) -> row`` and
    ``shutdown(pool)``."""
    machine = platform.machine()
    pause = _PAUSE.get(machine, "")
    if platform.system() == "Linux" and machine in _CALLS:
        futex, give_way = _CALLS[machine]
        declare = "llvm.func @syscall(i64, ...) -> i64"
        yields = f"""%yn = arith.constant {give_way} : i64
      %y = llvm.call @syscall(%yn) vararg(!llvm.func<i64 (i64, ...)>) : (i64) -> i64"""
        sleep = f"""%fn = arith.constant {futex} : i64
        %fw = arith.constant 128 : i32
        %nul = llvm.mlir.zero : {PTR}
        %l32 = arith.trunci %last : i64 to i32
        %q = llvm.call @syscall(%fn, %job, %fw, %l32, %nul) vararg(!llvm.func<i64 (i64, ...)>)
          : (i64, {PTR}, i32, i32, {PTR}) -> i64"""
        wake = f"""%fn = arith.constant {futex} : i64
    %fw = arith.constant 129 : i32
    %all = arith.constant 65536 : i32
    %q = llvm.call @syscall(%fn, %job, %fw, %all) vararg(!llvm.func<i64 (i64, ...)>) : (i64, {PTR}, i32, i32) -> i64"""
    else:  # no futex: sleep in short steps
        declare = "llvm.func @sched_yield() -> i32\nllvm.func @usleep(i32) -> i32"
        yields = "%y = llvm.call @sched_yield() : () -> i32"
        sleep = "%us = arith.constant 200 : i32\n        %q = llvm.call @usleep(%us) : (i32) -> i32"
        wake = ""
    return f"""
{declare}
func.func private @barrier(%ctr: {PTR}, %threads: i64) {{
  %zero = arith.constant 0 : i64
  %one = arith.constant 1 : i64
  %spins = arith.constant {_SPINS_BARRIER} : i64
  %old = llvm.atomicrmw add %ctr, %one acq_rel {{alignment = 8 : i64}} : {PTR}, i64
  %turn = arith.divui %old, %threads : i64
  %next = arith.addi %turn, %one : i64
  %target = arith.muli %next, %threads : i64
  scf.while (%i = %zero) : (i64) -> (i64) {{
    %v = llvm.load %ctr atomic acquire {{alignment = 8 : i64}} : {PTR} -> i64
    %c = arith.cmpi ult, %v, %target : i64
    scf.condition(%c) %i : i64
  }} do {{
  ^bb0(%i: i64):
    {pause}
    %over = arith.cmpi ugt, %i, %spins : i64
    scf.if %over {{
      {yields}
    }}
    %n = arith.addi %i, %one : i64
    scf.yield %n : i64
  }}
  return
}}
func.func @run(%pool: {PTR}, %ctx: {PTR}, %tid: i64, %start: i64) -> i64 {{
  %zero = arith.constant 0 : i64
  %one = arith.constant 1 : i64
  %words = arith.constant {abi.WORDS} : i64
  %pb = llvm.getelementptr %ctx[{abi.TABLE}] : ({PTR}) -> {PTR}, i64
  %table = llvm.load %pb : {PTR} -> {PTR}
  %pt = llvm.getelementptr %ctx[{abi.THREADS}] : ({PTR}) -> {PTR}, i64
  %threads = llvm.load %pt : {PTR} -> i64
  %ctr = llvm.getelementptr %pool[{COUNTER}] : ({PTR}) -> {PTR}, i64
  %end = scf.while (%i = %start) : (i64) -> (i64) {{
    %at = arith.muli %i, %words : i64
    %row = llvm.getelementptr %table[%at] : ({PTR}, i64) -> {PTR}, i64
    %fn = llvm.load %row : {PTR} -> i64
    %go = arith.cmpi ne, %fn, %zero : i64
    scf.condition(%go) %i : i64
  }} do {{
  ^bb0(%i: i64):
    %at = arith.muli %i, %words : i64
    %row = llvm.getelementptr %table[%at] : ({PTR}, i64) -> {PTR}, i64
    %fn = llvm.load %row : {PTR} -> {PTR}
    llvm.call %fn(%row, %ctx, %tid) : !llvm.ptr, ({PTR}, {PTR}, i64) -> ()
    %pf = llvm.getelementptr %row[{abi.FLAGS}] : ({PTR}) -> {PTR}, i64
    %flags = llvm.load %pf : {PTR} -> i64
    %bit = arith.andi %flags, %one : i64
    %wait = arith.cmpi ne, %bit, %zero : i64
    scf.if %wait {{
      func.call @barrier(%ctr, %threads) : ({PTR}, i64) -> ()
    }}
    %n = arith.addi %i, %one : i64
    scf.yield %n : i64
  }}
  func.call @barrier(%ctr, %threads) : ({PTR}, i64) -> ()
  return %end : i64
}}
func.func @worker(%pool: {PTR}, %tid: i64) {{
  %zero = arith.constant 0 : i64
  %one = arith.constant 1 : i64
  %spins = arith.constant {_SPINS_WORKER} : i64
  %job = llvm.getelementptr %pool[{JOB}] : ({PTR}) -> {PTR}, i64
  %sleepers = llvm.getelementptr %pool[{SLEEPERS}] : ({PTR}) -> {PTR}, i64
  %stop = llvm.getelementptr %pool[{STOP}] : ({PTR}) -> {PTR}, i64
  %pc = llvm.getelementptr %pool[{CONTEXT}] : ({PTR}) -> {PTR}, i64
  %ps = llvm.getelementptr %pool[{START}] : ({PTR}) -> {PTR}, i64
  %r = scf.while (%last = %zero) : (i64) -> i64 {{
    %found:2 = scf.while (%i = %zero) : (i64) -> (i64, i64) {{
      %v = llvm.load %job atomic acquire {{alignment = 8 : i64}} : {PTR} -> i64
      %same = arith.cmpi eq, %v, %last : i64
      scf.condition(%same) %i, %v : i64, i64
    }} do {{
    ^bb0(%i: i64, %v: i64):
      {pause}
      %over = arith.cmpi ugt, %i, %spins : i64
      scf.if %over {{
        %a = llvm.atomicrmw add %sleepers, %one seq_cst : {PTR}, i64
        {sleep}
        %b = llvm.atomicrmw sub %sleepers, %one seq_cst : {PTR}, i64
      }}
      %n = arith.addi %i, %one : i64
      %z = arith.select %over, %zero, %n : i64
      scf.yield %z : i64
    }}
    %s = llvm.load %stop atomic acquire {{alignment = 8 : i64}} : {PTR} -> i64
    %go = arith.cmpi eq, %s, %zero : i64
    scf.if %go {{
      %ctx = llvm.load %pc : {PTR} -> {PTR}
      %start = llvm.load %ps : {PTR} -> i64
      %e = func.call @run(%pool, %ctx, %tid, %start) : ({PTR}, {PTR}, i64, i64) -> i64
    }}
    scf.condition(%go) %found#1 : i64
  }} do {{
  ^bb0(%l: i64):
    scf.yield %l : i64
  }}
  return
}}
func.func private @kick(%pool: {PTR}) {{
  %zero = arith.constant 0 : i64
  %one = arith.constant 1 : i64
  %job = llvm.getelementptr %pool[{JOB}] : ({PTR}) -> {PTR}, i64
  %sleepers = llvm.getelementptr %pool[{SLEEPERS}] : ({PTR}) -> {PTR}, i64
  %a = llvm.atomicrmw add %job, %one seq_cst : {PTR}, i64
  %s = llvm.load %sleepers atomic seq_cst {{alignment = 8 : i64}} : {PTR} -> i64
  %w = arith.cmpi ugt, %s, %zero : i64
  scf.if %w {{
    {wake}
  }}
  return
}}
func.func @launch(%pool: {PTR}, %ctx: {PTR}, %start: i64) -> i64 {{
  %zero = arith.constant 0 : i64
  %pc = llvm.getelementptr %pool[{CONTEXT}] : ({PTR}) -> {PTR}, i64
  %ps = llvm.getelementptr %pool[{START}] : ({PTR}) -> {PTR}, i64
  llvm.store %ctx, %pc : {PTR}, {PTR}
  llvm.store %start, %ps : i64, {PTR}
  func.call @kick(%pool) : ({PTR}) -> ()
  %end = func.call @run(%pool, %ctx, %zero, %start) : ({PTR}, {PTR}, i64, i64) -> i64
  return %end : i64
}}
func.func @shutdown(%pool: {PTR}) {{
  %one = arith.constant 1 : i64
  %stop = llvm.getelementptr %pool[{STOP}] : ({PTR}) -> {PTR}, i64
  llvm.store %one, %stop atomic release {{alignment = 8 : i64}} : i64, {PTR}
  func.call @kick(%pool) : ({PTR}) -> ()
  return
}}
"""
