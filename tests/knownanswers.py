"""What another implementation made of the same numbers: Microsoft SEAL.

A secret key of SEAL's, by TenSEAL 0.3.18: degree 8192 and the primes of
``dipy_ppir.mpc.lattice``. It keeps digits -1, 0 and 1 transformed.
"""

import base64

import numpy as np

#: Five digits a byte, each more by one, the lowest first.
_DIGITS = (
    "0M=atA7JN8QpcRqGd4FCDi-51g+vpv1~OMCBGVV&G)3kXD+3!ST9y^;<}fBim^(S;AJofRzcFYvF"
    "OsKODl9ovBmwD+KjXb@zA_%MT>^{5Ya(lDFG}g}Tg*o2<aTu<Z+M`jLTnN<u6k+EhbFxq>mSv>p)"
    "Brwm2IN{&=sw!s%2a|!5PSB6NR1;;=EPvtY<kx0^|@Pc#}3Wd)jhL19&4^&6~P+!Qb5n2fD*B&%A"
    "4X!ICy@8M>AVd^@Qk37u9K+Yh^8AQ?w_q<}<FL45A87>YJmM<Vjnpr>~iz@HzZA<AE|Sv+VyrPMS"
    "-L>8;b6d@9lh-h<>UN^w+LfrBz1QE;+bm2;ARz`p>nQV!Lg2j2>6bNc_L0k`0SJ_#o>TyOX#<@YG"
    "Q<ykKB(vn6dGSlY6Fqg%B5g#D%mV=pRYkDFnc_=UU5-V9FzM^2Zpg_8%siEm2_AmTkdBETfI5}vH"
    "P2iKwiQoWgMn%-$PXOFfg|B`xE@nPVMD8r21jp7KJc6!gx=9^vWXZt3&$8i3nH#D&7!4NU*p~dJ;"
    "0wqK&DnhUNk_(6fl7(8o_C&oE}LE<T<uJe%4-ZGwiB2Add1$3c6F$c_<2ScNI2%Md@UdQ%FO-f2a"
    "s$zQ$L(Ot)gcHj!9kg4|ZAZ{q3#=daQ`AR|!Fu99<rd}UXEk7zip*$1z(faVdd2C);VQoPg#HPI0"
    "@P|IU$XmoiobLfwZm&VG`FPF73Q;JNfl5$6Lb8B-HnC2tJRYqdF;_NZ21$8K%3J|>?yI12Z>B^Yy"
    "k2^`}hMH^z5xg2b-*<f5V17qYM0$D1zBITp=?B^wbDzs3c}=~cU?Jlf(so1>(-5&eB#Wn85nP{22"
    "5Q?N46-hAN4U#42f0KnnBO0c<$jx`>NI&n%|^LMXB>tYb%@FjR(jRKem+2TqFuwoZw!ctxM8(D$q"
    "H~sQ6;W;%XzO@r!L~8)*_-XR>-a`gcU+eH6YWf4Z7c$-GXfKR-QE4D1qD#<RHxrE5Jn9IB4f($St"
    "|L@|bvAhj{^O*w`X=hXLj2%QH9*EYb}|s9vJJkm19ammXs9qS~ldPF>@U=fqOFQqE=}cyT%|M%l1"
    "%qI-pp2H$qu%z6lQTnB@|kgR830Ea(5sj3+&kCYvOeFX4d20p|#Dp)~XtDOa-u*;obgnX9k9#!L$"
    "C2&!*UKBGidAe>r7D&@H(dIMGIWK-o3X-8*>KT?I&|94uIW!sH9Ye^7Cyziatf113tmnYUR9hw}Y"
    "1)6l?RLPmuvH&aYvVk?$f}k}Md*-(z@>aTutJ$<paI{y1Ahi0876XUsc+h_?|tGoSI;mSb1aT6GY"
    "mQeHSR)Nta96WszxjF$m_wCy}eFK6<^e-%4=b>66byfR|<FIjXbWUftO_jqw83=GqNs>&=2itC%s"
    "$7q2({oaW$EW$q;*=UQy$E!klE9o~#T8s;JH^+#Ao4KG+}w2MP%#LYD9-K3Lp%;2|EnqA;+!)Y%i"
    "VHtj@ouyQS6S_CRUQjc+a8Dao?zNBtyO5NNp#(Y_u4KtDOJ$=y+Szpt-v+uAeD#y|*FJrQ7n-1sh"
    "sTk3FVy&RX*JelW=9zeXWGF6Tzolew7fBK5YlMEJk7&uNswTLJ)4*be1e+&}=olm+j#f=Te;It{J"
    ">#~u0;5pzj0Q?)VmiHctiHf_qTXk^0Lh7A0oXYUKb5J~uq2do&TGIY!-2>?tDsD_MPd<Sj8lOoKI"
    "2O{x|XGA0}@Ej-r0x3D^|U?ua_N1PHu_RjvL9hv#wMhwwsIEJ;rI{WW){^n{Nh}R91?x?yER|DlF"
    "@%?xZ>q7FPq75Lmzur<K!%1E5O|w|Tl&53zG_N(0W{jAg($2}Y{`vw>fm?6Mjw=FQtnJ~T<c?dCv"
    "9PTqq>V_ur$4<TG|uu-Ahgvw-ncZ{2-5UJ}*%k8GymLMRfX`JjJv&EjTWdeK{ML#8IdIQMv6D*P|"
    "%7mwvskj@ScWt76CTgJ|E`D+uxOOsW@m+Akljk)jT*VR)+K><B3(P=S$(&+77+iq1=YlHK%sj}%n"
    "$L@|0B*y6L&h#jCfUZv(>rrA<?5nq?88~fR(Z%^3M4jnxygfzSLBFQCjp&<9Wr2D7FKL2zEcM"
)
#: SHA-256 of the transformed digits, 64-bit integers, and some of them.
SHA256 = "e5d985ecff3b3a5efb9e1ae096e9754b817aab19feb51b7f3cefb7d8f400622c"
FIRST = (839056540436272, 271085022809571, 917981161234542, 1091648234724932)
LAST = (585304420873964, 225818317844377, 1004806386199668, 1068412395414717)


def digits(n):
    """The key's n digits."""
    packed = np.frombuffer(base64.b85decode(_DIGITS), np.uint8)
    each = packed[:, None] // np.array([1, 3, 9, 27, 81], np.uint8) % np.uint8(3)
    return each.reshape(-1)[:n].astype(np.int64) - 1
