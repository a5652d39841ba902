/* The move of one server between two nodes, with its directory row, two senders, two moves and one
 * crash of a node at any step. No clocks: every time-out may fire at any moment, which covers every
 * length of it. Messages between nodes may be lost (a full channel drops, and `lose` takes one away)
 * and are repeated.
 *
 * README.md beside this file says which code each step stands for.
 *
 *   -DNO_SWAP     the swap writes without comparing            (must fail)
 *   -DDROP_EARLY  the frozen copy is dropped at the commit      (must fail)
 *   -DNO_HOLD     a live copy releases before it may            (must fail)
 *   -DNO_RECORDS  a repeat is executed again                    (must fail)
 */
#define SENDERS 2
#define REQUESTS 2          /* of each sender, one after the other */
#define MOVES 2
#define NOBODY 2

/* phases of a copy at a node */
#define NONE 0
#define SERVING 1
#define FROZEN 2            /* source: from the capture to the end of the move */
#define READY 3             /* target: whole, serves nothing */
#define LIVE 4              /* target: executes, releases nothing */

/* the row */
byte epoch = 1; byte owner = 0; bit sure = 1;      /* sure: ACTIVE; else COMMITTED */
byte previous = NOBODY; byte nonce = 0; bit lost = 0;

/* the copies: what was executed for each sender is the state that must not be lost */
typedef Copy { byte phase; byte epoch; byte id; byte done[SENDERS] };   /* id: the move it came by */
Copy copy[2];
bit alive[2] = { 1, 1 };
byte moves = 0;

/* source side of the move that a node leads */
#define IDLE 0
#define SHIPPING 1
#define COMMITTING 2
#define COMMITTED 3
#define RECLAIMING 4
#define RELEASING 5
typedef Move { byte phase; byte base; byte id };   /* base: the epoch it compares with */
Move move[2];

mtype = { FINAL, REFUSE, PREPARED, ACTIVATE, ACTIVATED, DENIED, DROPPED, ABORT };
chan to0 = [2] of { mtype, byte, byte, byte, byte };    /* kind, id, epoch, done0, done1 */
chan to1 = [2] of { mtype, byte, byte, byte, byte };

byte at[SENDERS];           /* where a sender believes the server to be */
byte acked[SENDERS];        /* what it was told is done */

inline tell(to, what, xfer, xepoch, x0, x1) {
  if
  :: to == 0 && nfull(to0) -> to0!what,xfer,xepoch,x0,x1
  :: to == 1 && nfull(to1) -> to1!what,xfer,xepoch,x0,x1
  :: to == 0 && full(to0) -> skip      /* lost; whatever matters is repeated */
  :: to == 1 && full(to1) -> skip
  fi
}

/* Who holds everything that was acknowledged: checked whenever something is acknowledged, and at
 * every change of the row. Excused only once the server is lost. */
#define HAS(n) (copy[n].done[0] >= acked[0] && copy[n].done[1] >= acked[1])
#define CAN(n) (alive[n] && copy[n].phase != NONE && HAS(n))
#define KEPT (lost || !alive[owner] || CAN(owner) || (!sure && CAN(previous)))
/* At most one copy releases. */
#define ONE (!(alive[0] && alive[1] && copy[0].phase == SERVING && copy[1].phase == SERVING))

inline forget(n) {
  copy[n].phase = NONE; copy[n].epoch = 0; copy[n].id = 0; copy[n].done[0] = 0; copy[n].done[1] = 0
}

inline swap_commit(me, other, won) {
  atomic {
    if
#ifdef NO_SWAP
    :: true ->
#else
    :: !lost && epoch == move[me].base && owner == me ->
#endif
         epoch = move[me].base + 1; owner = other; sure = 0; previous = me; nonce = move[me].id;
         won = 1
    :: !lost && epoch == move[me].base + 1 && nonce == move[me].id && owner == other -> won = 1
#ifndef NO_SWAP
    :: else -> won = 0
#endif
    fi
  }
}

inline swap_reclaim(me, other, won) {
  atomic {
    if
#ifdef NO_SWAP
    :: true ->
#else
    :: !lost && epoch == move[me].base + 1 && owner == other && !sure && nonce == move[me].id ->
#endif
         epoch = epoch + 1; owner = me; sure = 1; previous = NOBODY; won = 1
    :: !lost && owner == me && epoch == move[me].base + 2 -> won = 1
#ifndef NO_SWAP
    :: else -> won = 0
#endif
    fi
  }
}

inline serve(me) {                  /* the server is here, and released */
  copy[me].phase = SERVING; copy[me].epoch = epoch;
  assert(ONE)
}

proctype Node(byte me) {
  byte other = 1 - me, id, e, d0, d1; bit won; mtype kind;
end:
  do
  :: atomic { !alive[me] -> break }

  /* ---- leads a move: PREPARING .. SHIPPING */
  :: atomic { alive[me] && move[me].phase == IDLE && copy[me].phase == SERVING && moves < MOVES ->
       moves++; move[me].phase = SHIPPING; move[me].base = epoch; move[me].id = moves;
       copy[me].phase = FROZEN;
       tell(other, FINAL, moves, epoch, copy[me].done[0], copy[me].done[1]) }
  :: atomic { alive[me] && move[me].phase == SHIPPING && alive[other] ->       /* repeat */
       tell(other, FINAL, move[me].id, move[me].base, copy[me].done[0], copy[me].done[1]) }
  :: atomic { alive[me] && move[me].phase == SHIPPING ->         /* time-out or death: roll back */
       tell(other, ABORT, move[me].id, 0, 0, 0);
       move[me].phase = IDLE; serve(me) }

  /* ---- commit; the answer of the directory may come after the swap took effect or be repeated */
  :: atomic { alive[me] && move[me].phase == COMMITTING ->
       swap_commit(me, other, won);
       assert(KEPT);
       if
       :: won -> skip                                    /* took effect; not known yet */
       :: won -> move[me].phase = COMMITTED;
#ifdef DROP_EARLY
                 forget(me);
#endif
                 tell(other, ACTIVATE, move[me].id, move[me].base + 1, 0, 0)
       :: !won -> move[me].phase = IDLE; forget(me)      /* fenced */
       fi }
  :: atomic { alive[me] && move[me].phase == COMMITTED && alive[other] ->      /* repeat */
       tell(other, ACTIVATE, move[me].id, move[me].base + 1, 0, 0) }
  :: atomic { alive[me] && move[me].phase == COMMITTED -> move[me].phase = RECLAIMING }
  :: atomic { alive[me] && move[me].phase == RECLAIMING ->
       swap_reclaim(me, other, won);
       assert(KEPT);
       if
       :: won -> skip                                    /* took effect; not known yet */
       :: won -> move[me].phase = IDLE; serve(me); tell(other, ABORT, move[me].id, 0, 0, 0)
       :: !won -> move[me].phase = IDLE; forget(me)      /* the target has confirmed */
       fi }
  :: atomic { alive[me] && move[me].phase == RELEASING && alive[other] ->      /* repeat */
       tell(other, DROPPED, move[me].id, 0, 0, 0) }
  :: atomic { alive[me] && move[me].phase == RELEASING -> move[me].phase = IDLE }

  /* ---- target in doubt: reads the row, confirms by a swap of its own */
  :: atomic { alive[me] && copy[me].phase == READY && owner == me && !sure && !lost &&
              nonce == copy[me].id -> copy[me].phase = LIVE }
  :: atomic { alive[me] && (copy[me].phase == READY) && (epoch > copy[me].epoch || lost) &&
              owner != me -> forget(me) }
  :: atomic { alive[me] && copy[me].phase == LIVE ->
       if
       :: owner == me && !sure && !lost && nonce == copy[me].id -> sure = 1; serve(me)
       :: !(owner == me && !lost && nonce == copy[me].id) -> forget(me)
       :: else -> skip
       fi;
       assert(KEPT) }
#ifdef NO_HOLD
  :: atomic { alive[me] && copy[me].phase == LIVE -> serve(me) }
#endif

  /* ---- what comes in */
  :: atomic { alive[me] &&
       ((me == 0 && nempty(to0)) || (me == 1 && nempty(to1))) ->
       if :: me == 0 -> to0?kind,id,e,d0,d1 :: me == 1 -> to1?kind,id,e,d0,d1 fi;
       if
       :: kind == FINAL ->
            if
            :: move[me].phase == IDLE &&
               (copy[me].phase == NONE || (copy[me].phase == READY && copy[me].id < id)) ->
                 copy[me].phase = READY; copy[me].epoch = e; copy[me].id = id;   /* was loaded */
                 copy[me].done[0] = d0; copy[me].done[1] = d1;
                 tell(other, PREPARED, id, e, 0, 0)
            :: copy[me].phase == READY && copy[me].id == id -> tell(other, PREPARED, id, e, 0, 0)
            :: copy[me].phase == NONE -> tell(other, REFUSE, id, 0, 0, 0)   /* could not be */
            :: else -> skip
            fi
       :: kind == PREPARED && move[me].phase == SHIPPING && id == move[me].id ->
            move[me].phase = COMMITTING
       :: kind == REFUSE && move[me].phase == SHIPPING && id == move[me].id ->
            move[me].phase = IDLE; serve(me)
       :: kind == ACTIVATE ->
            if
            :: copy[me].phase == READY && copy[me].id == id ->
                 copy[me].phase = LIVE; tell(other, ACTIVATED, id, 0, 0, 0)
            :: copy[me].phase == LIVE && copy[me].id == id -> tell(other, ACTIVATED, id, 0, 0, 0)
            :: copy[me].phase == NONE -> tell(other, DENIED, id, 0, 0, 0)
            :: else -> skip
            fi
       :: kind == ACTIVATED && move[me].phase == COMMITTED && id == move[me].id ->
            move[me].phase = RELEASING; forget(me);
            tell(other, DROPPED, id, 0, 0, 0)
       :: kind == ACTIVATED && move[me].phase == RELEASING && id == move[me].id ->
            tell(other, DROPPED, id, 0, 0, 0)
       :: kind == DENIED && move[me].phase == COMMITTED && id == move[me].id ->
            move[me].phase = RECLAIMING
       :: kind == DROPPED && copy[me].phase == LIVE && copy[me].id == id -> serve(me)
       :: kind == ABORT && copy[me].phase == READY && copy[me].id == id -> forget(me)
       :: else -> skip                                   /* late: dropped in a named branch */
       fi;
       kind = FINAL; id = 0; e = 0; d0 = 0; d1 = 0 }
  od
}

/* A request and its reply, or its repeat, in one step: what may happen between them (the copy
 * freezes, the node dies, the reply is lost) is covered by the choice to lose the reply. */
proctype Sender(byte s) {
  byte n;
  do
  :: atomic { acked[s] == REQUESTS -> break }
  :: atomic { lost -> break }
  :: atomic { acked[s] < REQUESTS -> n = at[s];
       if
       :: alive[n] && (copy[n].phase == SERVING || copy[n].phase == LIVE) ->
            if
#ifdef NO_RECORDS
            :: true ->
#else
            :: copy[n].done[s] == acked[s] ->            /* the number that is expected */
#endif
                 copy[n].done[s]++
#ifndef NO_RECORDS
            :: else -> skip                              /* a repeat: answered from its record */
#endif
            fi;
            assert(copy[n].done[s] <= acked[s] + 1);     /* nothing runs twice */
            if
            :: copy[n].phase == SERVING ->               /* the reply arrives */
                 assert(copy[n].done[s] == acked[s] + 1);
                 acked[s]++;
                 assert(owner == n && !lost);            /* one owner, and it is this one */
                 assert(KEPT)
            :: true -> skip                              /* held back, or lost */
            fi
       :: else -> at[s] = owner                          /* NotHere, Moved, or silence: look it up */
       fi; n = 0 }
  od
}

/* One node may die at any step; who sees it marks the row as lost where the rules allow. */
proctype Crash() {
  if
  :: atomic { true -> alive[0] = 0; forget(0); move[0].phase = IDLE }
  :: atomic { true -> alive[1] = 0; forget(1); move[1].phase = IDLE }
  :: skip
  fi;
end:
  do
  :: atomic { !alive[owner] && !lost &&
       (sure || previous == NOBODY || !alive[previous] ||
        (move[previous].phase != COMMITTING && move[previous].phase != COMMITTED &&
         move[previous].phase != RECLAIMING)) ->
       lost = 1; epoch = epoch + 1 }
  :: atomic { lost -> break }
  od
}

init {
  atomic {
    copy[0].phase = SERVING; copy[0].epoch = 1;
    run Node(0); run Node(1); run Sender(0); run Sender(1); run Crash()
  }
}

/* Progress: everybody is served in the end, or the server is lost (its owner died). */
ltl served { <> (lost || (acked[0] == REQUESTS && acked[1] == REQUESTS)) }
